// What the warp-specialised kernels of sm_90a share: their roles, the rings of tiles between them,
// and clusters.
//
// One thread of a block, the producer, brings tiles by the copy engine; two warpgroups, the
// consumers, multiply them. Blocks stay and take one tile of y after the other.
//
// kCluster neighbouring blocks compute neighbouring tiles of y that need the same tile of one
// operand: each block brings its share of that to all, so that it leaves the L2 once. Why: products
// of 128 x 256 x 128 take the tensor cores of an SM 1024 clocks, and their operands are 48 KB for
// INT8 and 36 KB for ternary, 11 and 8 TB/s at full rate, where the L2 of an H100 gives some 5.5 to
// 7. With the larger operand shared by two they are 32 and 20 KB, 7.4 and 4.7 TB/s; 1300 TOPS, two
// thirds of that rate, need 4.9 and 3.1. Clusters of four would give 24 and 12 KB and leave SMs
// idle where a GPC has no multiple of four. Unmeasured; 1 is the alternative.
#pragma once

#include <algorithm>

#include "common/cuda/barrier.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/linear.h"
#include "common/cuda/raster.cuh"
#include "common/cuda/tma.cuh"

namespace trine {

inline constexpr int kCluster = 2;

inline constexpr int kGroupThreads = 4 * kWarpThreads;  // of a warpgroup
inline constexpr int kGroupRows = 64;                   // of A, that a warpgroup multiplies
inline constexpr int kRolesThreads = 3 * kGroupThreads;
inline constexpr int kConsumerWarps = 2 * kGroupThreads / kWarpThreads;
// Registers of a thread: 128 * 40 + 256 * 232 is what an SM has.
inline constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

// A ring of `kCount` tiles in shared memory. landed[i] ends a phase when tile i has all its bytes,
// free[i] when all consumers have read it: those of kBlocks blocks, if what this block brings to
// tile i goes to as many. Tiles are numbered from 0, in the order of use.
template <int kCount, int kTileBytes, int kBlocks>
struct Ring {
  SharedAddress tiles, landed, free;  // of the first

  struct Use {
    SharedAddress tile, landed, free;
    uint32_t parity;
  };

  __device__ __forceinline__ Use use(int64_t number) const {
    const int index = int(number % kCount);
    return {tiles + index * kTileBytes, landed + index * int(sizeof(Mbarrier)),
            free + index * int(sizeof(Mbarrier)), uint32_t(number / kCount & 1)};
  }

  // By one thread.
  __device__ __forceinline__ void init() const {
    for (int i = 0; i < kCount; ++i) {
      mbarrier_init(landed + i * int(sizeof(Mbarrier)), 1);
      mbarrier_init(free + i * int(sizeof(Mbarrier)), kConsumerWarps * kBlocks);
    }
  }

  // By the producer: nobody reads any more what lay there, and all bytes are announced.
  __device__ __forceinline__ Use claim(int64_t number) const {
    const Use tile = use(number);
    mbarrier_wait(tile.free, tile.parity ^ 1u);
    mbarrier_arrive_expect(tile.landed, kTileBytes);
    return tile;
  }

  // By consumers.
  __device__ __forceinline__ Use await(int64_t number) const {
    const Use tile = use(number);
    mbarrier_wait(tile.landed, tile.parity);
    return tile;
  }

  // By a whole consumer warp that has read it.
  __device__ __forceinline__ void release(int64_t number) const {
    const uint32_t lane = threadIdx.x % kWarpThreads;
    if constexpr (kBlocks == 1) {
      if (lane == 0) mbarrier_arrive(use(number).free);
    } else {
      if (lane < kBlocks) mbarrier_arrive_remote(use(number).free, lane);
    }
  }
};

// By all producers of the cluster: kRows rows from y on reach all its blocks.
template <int kRows>
__device__ __forceinline__ void load_shared_tile(SharedAddress to, const TensorMap& map, int x,
                                                 int y, SharedAddress barrier) {
  if constexpr (kCluster == 1) {
    load_tile(to, map, x, y, barrier);
  } else {
    const int first = int(cluster_rank()) * (kRows / kCluster);
    load_tile_multicast(to + first * kTileRowBytes, map, x, y + first, barrier,
                        uint16_t((1 << kCluster) - 1));
  }
}

// A linear layer in tiles of y, each of which a cluster computes.
struct TiledLinear {
  DeviceLinear linear;
  int64_t row_tiles, column_tiles;
  int steps;  // of a tile of the weight

  template <class Visit>
  __device__ __forceinline__ void for_each_tile(const Visit& visit) const {
    const auto rows = uint32_t(row_tiles), columns = uint32_t(column_tiles);
    for (uint32_t t = blockIdx.x / kCluster; t < rows * columns; t += gridDim.x / kCluster)
      visit(raster_position(t, rows, columns));
  }
};

// The kernel of all three roles. `init`, by one thread, initialises the rings; `produce`, by the
// producer, and `consume`, by all consumers, get the position of each tile of y in turn.
template <class Init, class Produce, class Consume>
__device__ __forceinline__ void run_roles(const TiledLinear& problem, const Init& init,
                                          const Produce& produce, const Consume& consume) {
  if (threadIdx.x == 0) {
    init();
    fence_mbarrier_init();
  }
  kCluster == 1 ? __syncthreads() : cluster_sync();
  if (threadIdx.x < kGroupThreads) {
    give_up_registers<kProducerRegisters>();
    if (threadIdx.x == 0) problem.for_each_tile(produce);
    __syncwarp();
  } else {
    take_registers<kConsumerRegisters>();
    problem.for_each_tile(consume);
  }
  // The others of the cluster still arrive at barriers of this block.
  if constexpr (kCluster > 1) cluster_sync();
}

// `kernel` takes the maps and then the problem.
template <class Kernel, class... Maps>
void launch_roles(const char* op, Kernel kernel, const TiledLinear& problem, int dynamic_bytes,
                  cudaStream_t stream, const Maps&... maps) {
  const int64_t clusters = std::max(multiprocessors() / kCluster, 1);
  const int64_t tiles = problem.row_tiles * problem.column_tiles;
  launch(op, kernel, {std::min(tiles, clusters) * kCluster, kRolesThreads, dynamic_bytes, kCluster},
         stream, maps..., problem);
}

}  // namespace trine
