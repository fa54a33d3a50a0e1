// int8_linear for many rows on sm_90a: wgmma on tiles that the copy engine brings.
//
// A block computes 128 x 256 outputs at a time (pipeline.cuh says who does what). Four stages of
// 128 k of both operands, 48 KB each, are on their way. The two consumer warpgroups take 64 rows x
// 256 columns each: 128 sums a thread, which is why the producer's warpgroup gives its registers to
// them. The blocks of a cluster have the same columns: they share the weight, two thirds of a
// stage.
//
// What bounds it: the tensor cores. A stage is 8 products of 64 x 256 x 32, some 1000 cycles of
// them.
#include <type_traits>

#include "common/cuda/finish.cuh"
#include "common/cuda/pipeline.cuh"
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

// The 16 rows from m0 on and 256 columns from n0 on that a warp holds, 128 bytes of each row at a
// time. `staging` is the warp's own. What is to be activated stays float until then.
template <class T, bool kActivates>
__device__ __forceinline__ void store_sums(const DeviceLinear& linear, int64_t m0, int64_t n0,
                                           const int32_t (&sums)[kTileN / 2],
                                           unsigned char* staging) {
  using Staged = std::conditional_t<kActivates, float, T>;
  constexpr int kColumns = kOutBytes / int(sizeof(Staged)), kTiles = kColumns / 8;
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
            write_float(reinterpret_cast<Staged*>(staging + row * kOutStride) + in_part,
                        finished<0>(linear, sums[(part * kTiles + j) * 4 + 2 * half + column],
                                    m0 + row, scaling));
        }
      }
    __syncwarp();
    if constexpr (kActivates)
      store_activated_rows<kWarpRows, kOutBytes, kOutStride>(linear, m0, n0 + part * kColumns,
                                                             staging);
    else
      store_rows<T, kWarpRows, kOutBytes, kOutStride>(linear, m0, n0 + part * kColumns, staging);
    __syncwarp();
  }
}

template <class T>
__global__ void __launch_bounds__(kRolesThreads, 1)
    wgmma_kernel(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
                 const __grid_constant__ TiledLinear problem) {
  TRINE_DYNAMIC_SHARED(shared);
  TRINE_SHARED_ARRAY(Mbarrier, landed, kStages);
  TRINE_SHARED_ARRAY(Mbarrier, free, kStages);
  const Ring<kStages, kStageBytes, kCluster> ring = {shared_address(shared), shared_address(landed),
                                                     shared_address(free)};
  // Of the tile that this block computes of its cluster's.
  const auto first_row = [](const RasterPosition& tile) {
    return (tile.row * kCluster + cluster_rank()) * kTileM;
  };
  int64_t used = 0;  // stages

  const auto init = [&] {
    ring.init();
    prefetch_tensor_map(x_map);
    prefetch_tensor_map(w_map);
  };
  const auto produce = [&](const RasterPosition& tile) {
    for (int step = 0; step < problem.steps; ++step, ++used) {
      const auto stage = ring.claim(used);
      load_tile(stage.tile, x_map, step * kTileRowBytes, int(first_row(tile)), stage.landed);
      load_shared_tile<kTileN>(stage.tile + kStageABytes, w_map, step * kTileRowBytes,
                               int(tile.column) * kTileN, stage.landed);
    }
  };
  const auto consume = [&](const RasterPosition& tile) {
    const int warp = (int(threadIdx.x) - kGroupThreads) / kWarpThreads;
    const int group = warp * kWarpThreads / kGroupThreads;
    int32_t sums[kTileN / 2];
    for (int step = 0; step < problem.steps; ++step, ++used) {
      const auto stage = ring.await(used);
      const SharedAddress a = stage.tile + group * kGroupRows * kTileRowBytes;
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kTileRowBytes; k += kStepBytes)
        wgmma(S8{}, sums, tile_descriptor(a + k), tile_descriptor(stage.tile + kStageABytes + k),
              step > 0 || k > 0);
      wgmma_commit();
      // The products of the step before are done; those of this one may go on.
      wgmma_wait<1>();
      touch(sums);
      if (step > 0) ring.release(used - 1);
    }
    wgmma_wait<0>();
    touch(sums);
    ring.release(used - 1);
    const int64_t m0 = first_row(tile) + warp * kWarpRows, n0 = tile.column * kTileN;
    unsigned char* const staging = shared + kStages * kStageBytes + warp * kWarpRows * kOutStride;
    if (problem.linear.activation == Activation::none)
      store_sums<T, false>(problem.linear, m0, n0, sums, staging);
    else
      store_sums<T, true>(problem.linear, m0, n0, sums, staging);
  };
  run_roles(problem, init, produce, consume);
}

template <class T>
void run(const DeviceLinear& linear, cudaStream_t stream) {
  const char* op = "int8_linear";
  const auto tiles = [](int64_t count, int size) { return (count + size - 1) / size; };
  const TiledLinear problem = {linear, tiles(linear.m, kTileM * kCluster), tiles(linear.n, kTileN),
                               int(tiles(linear.weight_stride, kTileRowBytes))};
  const TensorMap x_map =
      make_tensor_map(op, linear.q, linear.m, linear.q_stride, linear.q_stride, kTileM);
  const TensorMap w_map = make_tensor_map(op, linear.weight, linear.n, linear.weight_stride,
                                          linear.weight_stride, kTileN / kCluster);
  launch_roles(op, wgmma_kernel<T>, problem, kDynamicBytes, stream, x_map, w_map);
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
