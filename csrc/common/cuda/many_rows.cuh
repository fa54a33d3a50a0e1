// Integer products for many rows of activations: tiles of y on the tensor cores of every GPU from
// sm_80 on (mma.m16n8k32, operands brought to shared memory by cp.async).
//
// A block computes a tile of outputs in steps of 64 k; of a linear layer 128 x 128. Its eight warps
// then stand 2 x 4, each computing 64 x 32: in a k32 step a warp loads 4 fragments of A and 4 of B
// for 16 products. Four stages in shared memory let three steps be on their way while one is
// computed; they take 64 KB for INT8, which fits sm_89's 99 KB, and twice sm_80's 163 KB.
//
// Rows of 64 bytes lie as four units of 16 in the order unit ^ (row / 2 % 4), so that the eight
// rows of a matrix that ldmatrix reads fall in all 32 banks.
//
// What bounds it: the rate of mma. sm_90 has wgmma, which is faster.
//
// A Weight says how its rows lie in a stage and become fragments of B:
//   Operands, Sum               of its products
//   kOffset                     what its values carry above the true ones, where they are integers
//   kStageRowBytes              of a stage's 64 k of one row
//   fragments(b, stage, n, step, lane)   b[0], b[1] of the 8 rows from n on, of k32 step `step`
#pragma once

#include "common/cuda/async_copy.cuh"
#include "common/cuda/finish.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/matrix.cuh"
#include "common/cuda/raster.cuh"

namespace trine {

inline constexpr int kStageK = 64;
inline constexpr int kManyRowsStages = 4;
inline constexpr int kCopyBytes = 16;  // of a copy

// Warps stand kDown x kAcross in a tile, each computing 16 * kWarpRowTiles by 32 outputs.
template <int kDown, int kAcross, int kWarpRowTiles>
struct TileShape {
  static constexpr int kRowTiles = kWarpRowTiles, kColumnTiles = 4;
  static constexpr int kWarpRows = 16 * kRowTiles, kWarpColumns = 8 * kColumnTiles;
  static constexpr int kWarpsAcross = kAcross;
  static constexpr int kRows = kDown * kWarpRows, kColumns = kAcross * kWarpColumns;
  static constexpr int kThreads = kDown * kAcross * kWarpThreads;

  static __device__ __forceinline__ int warp_m() {
    return int(threadIdx.x) / kWarpThreads / kWarpsAcross * kWarpRows;
  }
  static __device__ __forceinline__ int warp_n() {
    return int(threadIdx.x) / kWarpThreads % kWarpsAcross * kWarpColumns;
  }

  // Of a thread; sum 2 * half + i of a tile is of row lane / 4 + 8 * half and of column_of(j, i).
  template <class Sum>
  using Sums = Sum[kRowTiles][kColumnTiles][4];

  static __device__ __forceinline__ int column_of(int j, int i) {
    return warp_n() + 8 * j + int(threadIdx.x) % kWarpThreads % 4 * 2 + i;
  }

  template <class Weight>
  static constexpr int kStageBytes = kRows * kStageK + kColumns * Weight::kStageRowBytes;
};

// What linear layers are cut into, 128 x 128.
using LinearTile = TileShape<2, 4, 4>;

// The offset of a unit of a row of 64 bytes.
__device__ __forceinline__ uint32_t unit_offset(int row, int unit) {
  return uint32_t(row * kStageK + (unit ^ (row / 2 % 4)) * kCopyBytes);
}

// sums += A * B over `steps` stages. load(a, b, step) starts the copies of the calling thread that
// fill a stage: its rows of A at `a`, B as the Weight wants it at `b`. after(step) is called when
// the sums hold that step.
template <class Shape, class Weight, class Load, class After>
__device__ __forceinline__ void multiply_stages(
    int64_t steps, const Load& load, typename Shape::template Sums<typename Weight::Sum>& sums,
    const After& after) {
  constexpr int kStageABytes = Shape::kRows * kStageK;
  constexpr int kStageBytes = Shape::template kStageBytes<Weight>;
  TRINE_DYNAMIC_SHARED(stages);
  const int lane = int(threadIdx.x) % kWarpThreads;
  const int warp_m = Shape::warp_m(), warp_n = Shape::warp_n();

  const auto load_stage = [&](int stage, int64_t step) {
    unsigned char* const a = stages + stage * kStageBytes;
    load(a, a + kStageABytes, step);
  };
  const auto compute_stage = [&](int stage) {
    const unsigned char* const a_stage = stages + stage * kStageBytes;
    const unsigned char* const b_stage = a_stage + kStageABytes;
#pragma unroll
    for (int step = 0; step < kStageK / 32; ++step) {
      uint32_t a[Shape::kRowTiles][4], b[Shape::kColumnTiles][2];
#pragma unroll
      for (int i = 0; i < Shape::kRowTiles; ++i)
        // Matrices 0 and 1 are rows 0 to 7 and 8 to 15 of the first 16 bytes, 2 and 3 of the next.
        load_matrices(a[i], shared_address(a_stage + unit_offset(warp_m + 16 * i + lane % 16,
                                                                 2 * step + lane / 16)));
#pragma unroll
      for (int j = 0; j < Shape::kColumnTiles; ++j)
        Weight::fragments(b[j], b_stage, warp_n + 8 * j, step, lane);
#pragma unroll
      for (int i = 0; i < Shape::kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < Shape::kColumnTiles; ++j)
          multiply(typename Weight::Operands{}, sums[i][j], a[i], b[j]);
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
    after(step);
  }
}

// Calls store(sum, row_of(m), column_of(n)) for the sums of the calling thread in the first `rows`
// rows m and `columns` columns n of the tile.
template <class Shape, class Sum, class RowOf, class ColumnOf, class Store>
__device__ __forceinline__ void for_each_sum(
    const Sum (&sums)[Shape::kRowTiles][Shape::kColumnTiles][4], int64_t rows, int64_t columns,
    const RowOf& row_of, const ColumnOf& column_of, const Store& store) {
  const int lane = int(threadIdx.x) % kWarpThreads;
  const auto row_in_tile = [&](int i, int half) {
    return Shape::warp_m() + 16 * i + 8 * half + lane / 4;
  };
  decltype(row_of(0)) row[Shape::kRowTiles][2] = {};
#pragma unroll
  for (int i = 0; i < Shape::kRowTiles; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (row_in_tile(i, half) < rows) row[i][half] = row_of(row_in_tile(i, half));
#pragma unroll
  for (int j = 0; j < Shape::kColumnTiles; ++j)
#pragma unroll
    for (int in_pair = 0; in_pair < 2; ++in_pair) {
      const int n = Shape::column_of(j, in_pair);
      if (n >= columns) continue;
      const auto column = column_of(n);
#pragma unroll
      for (int i = 0; i < Shape::kRowTiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (row_in_tile(i, half) < rows)
            store(sums[i][j][2 * half + in_pair], row[i][half], column);
    }
}

template <class Weight>
__global__ void __launch_bounds__(LinearTile::kThreads, 1) many_rows_kernel(DeviceLinear linear) {
  constexpr int kTile = LinearTile::kRows;
  static_assert(LinearTile::kColumns == kTile);
  const int64_t row_tiles = (linear.m + kTile - 1) / kTile;
  const int64_t column_tiles = (linear.n + kTile - 1) / kTile;
  const RasterPosition tile =
      raster_position(blockIdx.x, uint32_t(row_tiles), uint32_t(column_tiles));
  const int64_t m0 = tile.row * kTile, n0 = tile.column * kTile;
  const int64_t steps =
      (linear.weight_stride + Weight::kStageRowBytes - 1) / Weight::kStageRowBytes;

  LinearTile::Sums<typename Weight::Sum> sums = {};
  const auto load = [&](unsigned char* a, unsigned char* b, int64_t step) {
    for (int i = int(threadIdx.x); i < kTile * kStageK / kCopyBytes; i += LinearTile::kThreads) {
      const int row = i / (kStageK / kCopyBytes), unit = i % (kStageK / kCopyBytes);
      copy_async(shared_address(a + unit_offset(row, unit)),
                 linear.q + (m0 + row) * linear.q_stride + step * kStageK + unit * kCopyBytes,
                 m0 + row < linear.m);
    }
    constexpr int kUnits = Weight::kStageRowBytes / kCopyBytes;
    for (int i = int(threadIdx.x); i < kTile * kUnits; i += LinearTile::kThreads) {
      const int row = i / kUnits, unit = i % kUnits;
      const int64_t at = step * Weight::kStageRowBytes + unit * kCopyBytes;
      copy_async(shared_address(b + Weight::unit_offset_of(row, unit)),
                 linear.weight + (n0 + row) * linear.weight_stride + at,
                 n0 + row < linear.n && at < linear.weight_stride);
    }
  };
  multiply_stages<LinearTile, Weight>(steps, load, sums, [](int64_t) {});

  if (linear.activation != Activation::none) {
    // Through shared memory, which the stages no longer need: 16 rows of a warp at a time.
    constexpr int kBytes = LinearTile::kWarpColumns * int(sizeof(float)), kStride = kBytes + 16;
    static_assert(LinearTile::kThreads / kWarpThreads * 16 * kStride <=
                  kManyRowsStages * LinearTile::kStageBytes<Weight>);
    TRINE_DYNAMIC_SHARED(stages);
    const int lane = int(threadIdx.x) % kWarpThreads;
    unsigned char* const staging = stages + int(threadIdx.x) / kWarpThreads * 16 * kStride;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < LinearTile::kRowTiles; ++i) {
      const int64_t first_m = m0 + LinearTile::warp_m() + 16 * i;
      const int64_t first_n = n0 + LinearTile::warp_n();
#pragma unroll
      for (int e = 0; e < LinearTile::kColumnTiles * 4; ++e) {
        const int row = 8 * (e % 4 / 2) + lane / 4, in_row = 8 * (e / 4) + 2 * (lane % 4) + e % 2;
        const int64_t m = first_m + row, n = first_n + in_row;
        if (m < linear.m && n < linear.n)
          *reinterpret_cast<float*>(staging + row * kStride + in_row * int(sizeof(float))) =
              finished<Weight::kOffset>(linear, sums[i][e / 4][e % 4], m,
                                        column_scaling(linear, n));
      }
      __syncwarp();
      store_activated_rows<16, kBytes, kStride>(linear, first_m, first_n, staging);
      __syncwarp();
    }
    return;
  }

  struct Column {
    int64_t n;
    ColumnScaling scaling;
  };
  for_each_sum<LinearTile>(
      sums, linear.m - m0, linear.n - n0, [&](int m) { return m0 + m; },
      [&](int n) { return Column{n0 + n, column_scaling(linear, n0 + n)}; },
      [&](int32_t sum, int64_t m, const Column& column) {
        write_float(linear.y, linear.type, m * linear.n + column.n,
                    finished<Weight::kOffset>(linear, sum, m, column.scaling));
      });
}

template <class Weight>
void many_rows_linear(const char* op, const DeviceLinear& linear, cudaStream_t stream) {
  constexpr int kTile = LinearTile::kRows;
  const auto tiles = [](int64_t count) { return (count + kTile - 1) / kTile; };
  launch(op, many_rows_kernel<Weight>,
         {tiles(linear.m) * tiles(linear.n), LinearTile::kThreads,
          kManyRowsStages * LinearTile::kStageBytes<Weight>},
         stream, linear);
}

}  // namespace trine
