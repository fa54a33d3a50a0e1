// int8_linear for many rows on sm_90a: wgmma on tiles that the copy engine brings.
//
// A block computes 128 x 256 outputs at a time, and goes on to the next tile until none is left.
// One warp is the producer: it keeps four stages of 128 k of both operands (48 KB each) on their
// way. Two warpgroups are consumers, each of 64 rows x 256 columns: 128 sums a thread, which is why
// the producers' warpgroup gives its registers to them.
//
// Barriers: landed[s] ends a phase when stage s has all its bytes, free[s] when all eight consumer
// warps have read it.
//
// What bounds it: the tensor cores. A stage is 8 products of 64 x 256 x 32, some 1000 cycles of
// them, and its 48 KB come from the L2 in about 700 if every SM reads at once.
#include <algorithm>

#include "common/cuda/finish.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/pipeline.cuh"
#include "common/cuda/raster.cuh"
#include "common/cuda/tma.cuh"
#include "common/cuda/wgmma.cuh"
#include "int8_linear/cuda.h"

namespace trine {
namespace sm90a {
namespace {

constexpr int kTileM = 128, kTileN = 256;
constexpr int kStages = 4;
constexpr int kStageABytes = kTileM * kTileRowBytes;
constexpr int kStageBytes = kStageABytes + kTileN * kTileRowBytes;
constexpr int kStepBytes = 32;  // of k, in one wgmma

// Outputs pass through shared memory, so that a row's 128 bytes leave together. 16 more bytes from
// row to row let the 8 rows that a warp writes at a time fall in different banks.
constexpr int kWarpRows = 16, kOutBytes = 128, kOutStride = kOutBytes + 16;
constexpr int kDynamicBytes = kStages * kStageBytes + kConsumerWarps * kWarpRows * kOutStride;

struct Problem {
  DeviceLinear linear;
  int64_t row_tiles, column_tiles;
  int steps;  // of 128 k
};

// The 16 rows from m0 on and 256 columns from n0 on that a warp holds, 128 bytes of each row at a
// time. `staging` is the warp's own.
template <class T>
__device__ __forceinline__ void store_sums(const DeviceLinear& linear, int64_t m0, int64_t n0,
                                           const int32_t (&sums)[kTileN / 2],
                                           unsigned char* staging) {
  constexpr int kColumns = kOutBytes / int(sizeof(T)), kTiles = kColumns / 8;
  const int lane = int(threadIdx.x) % kWarpThreads;
#pragma unroll
  for (int part = 0; part < kTileN / kColumns; ++part) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int in_part = 8 * j + 2 * (lane % 4) + column;
        const int64_t n = n0 + part * kColumns + in_part;
        if (n >= linear.n) continue;
        const ColumnScaling scaling = column_scaling(linear, n);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = 8 * half + lane / 4;
          if (m0 + row < linear.m)
            write_float(reinterpret_cast<T*>(staging + row * kOutStride) + in_part,
                        finished<0>(linear, sums[(part * kTiles + j) * 4 + 2 * half + column],
                                    m0 + row, scaling));
        }
      }
    __syncwarp();
    store_rows<T, kWarpRows, kOutBytes, kOutStride>(linear, m0, n0 + part * kColumns, staging);
    __syncwarp();
  }
}

template <class T>
__global__ void __launch_bounds__(kRolesThreads, 1)
    wgmma_kernel(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
                 const __grid_constant__ Problem problem) {
  TRINE_DYNAMIC_SHARED(shared);
  TRINE_SHARED_ARRAY(Mbarrier, landed, kStages);
  TRINE_SHARED_ARRAY(Mbarrier, free, kStages);
  const Ring<kStages, kStageBytes> ring = {shared_address(shared), shared_address(landed),
                                           shared_address(free)};
  const int64_t tiles = problem.row_tiles * problem.column_tiles;
  if (threadIdx.x == 0) {
    ring.init();
    fence_mbarrier_init();
    prefetch_tensor_map(x_map);
    prefetch_tensor_map(w_map);
  }
  __syncthreads();

  int64_t used = 0;  // stages
  if (threadIdx.x < kGroupThreads) {
    give_up_registers<kProducerRegisters>();
    if (threadIdx.x != 0) return;
    for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
      const RasterPosition tile = raster_position(t, problem.row_tiles, problem.column_tiles);
      for (int step = 0; step < problem.steps; ++step, ++used) {
        const auto stage = ring.use(used);
        mbarrier_wait(stage.free, stage.parity ^ 1u);
        mbarrier_arrive_expect(stage.landed, kStageBytes);
        load_tile(stage.tile, x_map, step * kTileRowBytes, int(tile.row) * kTileM, stage.landed);
        load_tile(stage.tile + kStageABytes, w_map, step * kTileRowBytes, int(tile.column) * kTileN,
                  stage.landed);
      }
    }
    return;
  }

  take_registers<kConsumerRegisters>();
  const int warp = (int(threadIdx.x) - kGroupThreads) / kWarpThreads;
  const int group = warp * kWarpThreads / kGroupThreads;
  const bool signals = threadIdx.x % kWarpThreads == 0;
  unsigned char* const staging = shared + kStages * kStageBytes + warp * kWarpRows * kOutStride;
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    int32_t sums[kTileN / 2];
    for (int step = 0; step < problem.steps; ++step, ++used) {
      const auto stage = ring.use(used);
      const SharedAddress a = stage.tile + group * kGroupRows * kTileRowBytes;
      mbarrier_wait(stage.landed, stage.parity);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kTileRowBytes; k += kStepBytes)
        wgmma(S8{}, sums, tile_descriptor(a + k), tile_descriptor(stage.tile + kStageABytes + k),
              step > 0 || k > 0);
      wgmma_commit();
      // The products of the step before are done; those of this one may go on.
      wgmma_wait<1>();
      touch(sums);
      if (step > 0 && signals) mbarrier_arrive(ring.use(used - 1).free);
    }
    wgmma_wait<0>();
    touch(sums);
    if (signals) mbarrier_arrive(ring.use(used - 1).free);
    const RasterPosition tile = raster_position(t, problem.row_tiles, problem.column_tiles);
    store_sums<T>(problem.linear, tile.row * kTileM + warp * kWarpRows, tile.column * kTileN, sums,
                  staging);
  }
}

template <class T>
void run(const DeviceLinear& linear, cudaStream_t stream) {
  const char* op = "int8_linear";
  Problem problem = {linear, (linear.m + kTileM - 1) / kTileM, (linear.n + kTileN - 1) / kTileN,
                     int((linear.weight_stride + kTileRowBytes - 1) / kTileRowBytes)};
  const TensorMap x_map =
      make_tensor_map(op, linear.q, linear.m, linear.q_stride, linear.q_stride, kTileM);
  const TensorMap w_map = make_tensor_map(op, linear.weight, linear.n, linear.weight_stride,
                                          linear.weight_stride, kTileN);
  const int64_t tiles = problem.row_tiles * problem.column_tiles;
  launch(op, wgmma_kernel<T>,
         {std::min<int64_t>(tiles, multiprocessors()), kRolesThreads, kDynamicBytes}, stream, x_map,
         w_map, problem);
}

}  // namespace
}  // namespace sm90a

void int8_linear_cuda_sm90a(const DeviceLinear& linear, cudaStream_t stream) {
  switch (linear.type) {
    case FloatType::float32:
      return sm90a::run<float>(linear, stream);
    case FloatType::bfloat16:
      return sm90a::run<bfloat16>(linear, stream);
    case FloatType::float16:
      return sm90a::run<float16>(linear, stream);
  }
}

}  // namespace trine
