// Integer linear layers for many rows of activations: tiles of y on the tensor cores of every GPU
// from sm_80 on (mma.m16n8k32, operands brought to shared memory by cp.async).
//
// A block computes 128 x 128 outputs, in steps of 64 k. Its eight warps stand 2 x 4, each computing
// 64 x 32: in a k32 step a warp loads 4 fragments of A and 4 of B for 16 products. Four stages in
// shared memory let three steps be on their way while one is computed; they take 64 KB for INT8,
// which fits sm_89's 99 KB, and twice sm_80's 163 KB.
//
// Rows of 64 bytes lie as four units of 16 in the order unit ^ (row / 2 % 4), so that the eight
// rows of a matrix that ldmatrix reads fall in all 32 banks.
//
// What bounds it: the rate of mma. sm_90 has wgmma, which is faster.
//
// A Weight says how its rows lie in a stage and become fragments of B:
//   kOffset                     what its values carry above the true ones
//   kStageRowBytes              of a stage's 64 k of one row
//   fragments(b, stage, n, step, lane)   b[0], b[1] of the 8 rows from n on, of k32 step `step`
#pragma once

#include "common/cuda/async_copy.cuh"
#include "common/cuda/finish.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/matrix.cuh"
#include "common/cuda/raster.cuh"

namespace trine {

inline constexpr int kManyRowsTile = 128;  // rows of x and of the weight
inline constexpr int kStageK = 64;
inline constexpr int kManyRowsStages = 4;
inline constexpr int kManyRowsWarps = 8;
inline constexpr int kManyRowsThreads = kManyRowsWarps * kWarpThreads;
inline constexpr int kCopyBytes = 16;  // of a copy

// The offset of a unit of a row of 64 bytes.
__device__ __forceinline__ uint32_t unit_offset(int row, int unit) {
  return uint32_t(row * kStageK + (unit ^ (row / 2 % 4)) * kCopyBytes);
}

template <class Weight>
__global__ void __launch_bounds__(kManyRowsThreads, 1) many_rows_kernel(DeviceLinear linear) {
  constexpr int kWarpRows = 64, kWarpColumns = 32;
  constexpr int kRowTiles = kWarpRows / 16, kColumnTiles = kWarpColumns / 8;
  constexpr int kStageABytes = kManyRowsTile * kStageK;
  constexpr int kStageBytes = kStageABytes + kManyRowsTile * Weight::kStageRowBytes;
  TRINE_DYNAMIC_SHARED(stages);

  const int warp = int(threadIdx.x) / kWarpThreads, lane = int(threadIdx.x) % kWarpThreads;
  const int64_t row_tiles = (linear.m + kManyRowsTile - 1) / kManyRowsTile;
  const int64_t column_tiles = (linear.n + kManyRowsTile - 1) / kManyRowsTile;
  const RasterPosition tile =
      raster_position(blockIdx.x, uint32_t(row_tiles), uint32_t(column_tiles));
  const int64_t m0 = tile.row * kManyRowsTile, n0 = tile.column * kManyRowsTile;
  const int64_t steps =
      (linear.weight_stride + Weight::kStageRowBytes - 1) / Weight::kStageRowBytes;

  const auto load_stage = [&](int stage, int64_t step) {
    unsigned char* const a = stages + stage * kStageBytes;
    unsigned char* const b = a + kStageABytes;
    for (int i = int(threadIdx.x); i < kManyRowsTile * kStageK / kCopyBytes;
         i += kManyRowsThreads) {
      const int row = i / (kStageK / kCopyBytes), unit = i % (kStageK / kCopyBytes);
      copy_async(shared_address(a + unit_offset(row, unit)),
                 linear.q + (m0 + row) * linear.q_stride + step * kStageK + unit * kCopyBytes,
                 m0 + row < linear.m);
    }
    constexpr int kUnits = Weight::kStageRowBytes / kCopyBytes;
    for (int i = int(threadIdx.x); i < kManyRowsTile * kUnits; i += kManyRowsThreads) {
      const int row = i / kUnits, unit = i % kUnits;
      const int64_t at = step * Weight::kStageRowBytes + unit * kCopyBytes;
      copy_async(shared_address(b + Weight::unit_offset_of(row, unit)),
                 linear.weight + (n0 + row) * linear.weight_stride + at,
                 n0 + row < linear.n && at < linear.weight_stride);
    }
  };

  const int warp_m = warp / 4 * kWarpRows, warp_n = warp % 4 * kWarpColumns;
  int32_t sums[kRowTiles][kColumnTiles][4] = {};
  const auto compute_stage = [&](int stage) {
    const unsigned char* const a_stage = stages + stage * kStageBytes;
    const unsigned char* const b_stage = a_stage + kStageABytes;
#pragma unroll
    for (int step = 0; step < kStageK / 32; ++step) {
      uint32_t a[kRowTiles][4], b[kColumnTiles][2];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
        // Matrices 0 and 1 are rows 0 to 7 and 8 to 15 of the first 16 bytes, 2 and 3 of the next.
        load_matrices(a[i], shared_address(a_stage + unit_offset(warp_m + 16 * i + lane % 16,
                                                                 2 * step + lane / 16)));
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j)
        Weight::fragments(b[j], b_stage, warp_n + 8 * j, step, lane);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) multiply(S8{}, sums[i][j], a[i], b[j]);
    }
  };

#pragma unroll
  for (int stage = 0; stage < kManyRowsStages - 1; ++stage) {
    if (stage < steps) load_stage(stage, stage);
    copy_async_commit();
  }
  for (int64_t step = 0; step < steps; ++step) {
    copy_async_wait<kManyRowsStages - 2>();
    // Everyone's part of this stage has landed, and everyone is done with the one before.
    __syncthreads();
    const int64_t next = step + kManyRowsStages - 1;
    if (next < steps) load_stage(int(next % kManyRowsStages), next);
    copy_async_commit();
    compute_stage(int(step % kManyRowsStages));
  }

#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const int64_t n = n0 + warp_n + 8 * j + 2 * (lane % 4) + column;
      if (n >= linear.n) continue;
      const ColumnScaling scaling = column_scaling(linear, n);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t m = m0 + warp_m + 16 * i + 8 * half + lane / 4;
          if (m < linear.m)
            write_float(
                linear.y, linear.type, m * linear.n + n,
                finished<Weight::kOffset>(linear, sums[i][j][2 * half + column], m, scaling));
        }
    }
}

template <class Weight>
void many_rows_linear(const char* op, const DeviceLinear& linear, cudaStream_t stream) {
  const auto tiles = [](int64_t count) { return (count + kManyRowsTile - 1) / kManyRowsTile; };
  launch(op, many_rows_kernel<Weight>,
         {tiles(linear.m) * tiles(linear.n), kManyRowsThreads,
          kManyRowsStages * kManyRowsTile * (kStageK + Weight::kStageRowBytes)},
         stream, linear);
}

}  // namespace trine
