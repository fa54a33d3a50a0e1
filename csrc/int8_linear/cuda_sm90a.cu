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
#include <type_traits>

#include "common/cuda/barrier.cuh"
#include "common/cuda/finish.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/raster.cuh"
#include "common/cuda/tma.cuh"
#include "common/cuda/wgmma.cuh"
#include "int8_linear/cuda.h"

namespace trine {
namespace sm90a {
namespace {

constexpr int kTileM = 128, kTileN = 256;
constexpr int kGroupRows = 64;  // of a consumer
constexpr int kGroupThreads = 128;
constexpr int kThreads = 3 * kGroupThreads;  // the producer's warpgroup is the first
constexpr int kConsumerWarps = 2 * kGroupThreads / kWarpThreads;
constexpr int kStages = 4;
constexpr int kStageABytes = kTileM * kTileRowBytes;
constexpr int kStageBytes = kStageABytes + kTileN * kTileRowBytes;
constexpr int kStepBytes = 32;  // of k, in one wgmma

// Outputs pass through shared memory, so that a row's 128 bytes leave together. 16 more bytes from
// row to row let the 8 rows that a warp writes at a time fall in different banks.
constexpr int kWarpRows = 16, kOutBytes = 128, kOutStride = kOutBytes + 16;
constexpr int kDynamicBytes = kStages * kStageBytes + kConsumerWarps * kWarpRows * kOutStride;

// 24 for the producers and 240 for the consumers: 128 * 24 + 256 * 240 is what an SM has.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

struct Problem {
  DeviceLinear linear;
  int64_t row_tiles, column_tiles;
  int steps;  // of 128 k
};

// The stage that is used `count`-th, and the parity of that use's phase.
struct Stage {
  int index;
  uint32_t parity;
};

__device__ __forceinline__ Stage stage_of(int64_t count) {
  return {int(count % kStages), uint32_t(count / kStages & 1)};
}

template <class T>
__device__ __forceinline__ void write_out(T* at, float value) {
  if constexpr (sizeof(T) == 4)
    *at = value;
  else if constexpr (std::is_same_v<T, bfloat16>)
    *at = narrow_to_bfloat16(value);
  else
    *at = narrow_to_float16(value);
}

// The 16 rows from m0 on and 256 columns from n0 on that a warp holds, 128 bytes of each row at a
// time. `staging` is the warp's own.
template <class T>
__device__ __forceinline__ void store_sums(const DeviceLinear& linear, int64_t m0, int64_t n0,
                                           const int32_t (&sums)[kTileN / 2],
                                           unsigned char* staging) {
  constexpr int kColumns = kOutBytes / int(sizeof(T)), kTiles = kColumns / 8;
  constexpr int kUnits = kWarpRows * kOutBytes / 16;
  const int lane = int(threadIdx.x) % kWarpThreads;
  T* const y = static_cast<T*>(linear.y);
  const bool whole_units = linear.n * int64_t(sizeof(T)) % 16 == 0;
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
            write_out(reinterpret_cast<T*>(staging + row * kOutStride) + in_part,
                      finished<0>(linear, sums[(part * kTiles + j) * 4 + 2 * half + column],
                                  m0 + row, scaling));
        }
      }
    __syncwarp();
#pragma unroll
    for (int unit = lane; unit < kUnits; unit += kWarpThreads) {
      const int row = unit / (kOutBytes / 16), at = unit % (kOutBytes / 16) * 16;
      const int64_t m = m0 + row, n = n0 + part * kColumns + at / int(sizeof(T));
      const unsigned char* from = staging + row * kOutStride + at;
      if (m >= linear.m) continue;
      if (whole_units) {
        if (n < linear.n) store_global<16>(y + m * linear.n + n, from);
      } else {
        for (int i = 0; i < 16 / int(sizeof(T)); ++i)
          if (n + i < linear.n)
            store_global<int(sizeof(T))>(y + m * linear.n + n + i, from + i * int(sizeof(T)));
      }
    }
    __syncwarp();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    wgmma_kernel(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
                 const __grid_constant__ Problem problem) {
  TRINE_DYNAMIC_SHARED(shared);
  TRINE_SHARED_ARRAY(Mbarrier, landed, kStages);
  TRINE_SHARED_ARRAY(Mbarrier, free, kStages);
  const int group = int(threadIdx.x) / kGroupThreads;
  const int64_t tiles = problem.row_tiles * problem.column_tiles;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(shared_address(landed + i), 1);
      mbarrier_init(shared_address(free + i), kConsumerWarps);
    }
    fence_mbarrier_init();
    prefetch_tensor_map(x_map);
    prefetch_tensor_map(w_map);
  }
  __syncthreads();

  if (group == 0) {
    give_up_registers<kProducerRegisters>();
    if (threadIdx.x != 0) return;
    int64_t count = 0;
    for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
      const RasterPosition tile = raster_position(t, problem.row_tiles, problem.column_tiles);
      for (int step = 0; step < problem.steps; ++step, ++count) {
        const Stage stage = stage_of(count);
        const SharedAddress barrier = shared_address(landed + stage.index);
        const SharedAddress a = shared_address(shared) + stage.index * kStageBytes;
        mbarrier_wait(shared_address(free + stage.index), stage.parity ^ 1u);
        mbarrier_arrive_expect(barrier, kStageBytes);
        load_tile(a, x_map, step * kTileRowBytes, int(tile.row) * kTileM, barrier);
        load_tile(a + kStageABytes, w_map, step * kTileRowBytes, int(tile.column) * kTileN,
                  barrier);
      }
    }
    // Nothing may land in a block that has ended: the consumers wait for all of it.
    return;
  }

  take_registers<kConsumerRegisters>();
  const int consumer = group - 1;
  const int warp = int(threadIdx.x) / kWarpThreads - kGroupThreads / kWarpThreads;
  const bool signals = threadIdx.x % kWarpThreads == 0;
  unsigned char* const staging = shared + kStages * kStageBytes + warp * kWarpRows * kOutStride;
  int64_t count = 0;
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    int32_t sums[kTileN / 2];
    for (int step = 0; step < problem.steps; ++step, ++count) {
      const Stage stage = stage_of(count);
      const SharedAddress a = shared_address(shared) + stage.index * kStageBytes;
      const SharedAddress own_a = a + consumer * kGroupRows * kTileRowBytes;
      mbarrier_wait(shared_address(landed + stage.index), stage.parity);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kTileRowBytes; k += kStepBytes)
        wgmma(S8{}, sums, tile_descriptor(own_a + k), tile_descriptor(a + kStageABytes + k),
              step > 0 || k > 0);
      wgmma_commit();
      // The products of the step before are done; those of this one may go on.
      wgmma_wait<1>();
      touch(sums);
      if (step > 0 && signals) mbarrier_arrive(shared_address(free + stage_of(count - 1).index));
    }
    wgmma_wait<0>();
    touch(sums);
    if (signals) mbarrier_arrive(shared_address(free + stage_of(count - 1).index));
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
         {std::min<int64_t>(tiles, multiprocessors()), kThreads, kDynamicBytes}, stream, x_map,
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
