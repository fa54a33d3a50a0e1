// int8_weight_linear for every GPU from sm_80 on.
//
// Few rows of 16-bit x (at most 16): as common/cuda/few_rows.cuh, whose shares of the work it has:
// weights go from memory straight into the registers of A, 16 consecutive bytes of a row in a lane,
// and become 16-bit floats there; x goes into those of B. Each weight is read once.
//
// More rows: tiles of y as common/cuda/many_rows.cuh cuts them. The weight stays int8 in shared
// memory and becomes 16-bit as fragments are loaded: of four values of B two loads of two bytes and
// six (bf16: ten) operations.
//
// fp32 x: tiles of y in registers, by fused multiply-adds.
//
// What bounds it: few rows by reading the weight from memory, many by the rate of mma.
#include "int8_weight_linear/cuda.h"

#include "common/cuda/few_rows.cuh"
#include "common/cuda/many_rows.cuh"
#include "int8_weight_linear/codes.cuh"

namespace trine {
namespace {

constexpr const char* kOp = "int8_weight_linear";

// What is added to a sum whose groups' scales are in it, or that has one scale.
__device__ __forceinline__ float finish_sum(const DeviceWeightLinear& problem, float sum,
                                            int64_t n) {
  const DeviceLinear& linear = problem.linear;
  const float scaled = problem.groups == 1 ? sum * linear.weight_scale[n] : sum;
  return linear.bias == nullptr ? scaled : scaled + read_float(linear.bias, linear.bias_type, n);
}

constexpr int kWeightFewRows = 16;
constexpr int kStepValues = 64;  // of k, that a warp takes at a time: no group cuts them
constexpr int kStepsInFlight = kLoadsInFlight / 2;
// Of an SM. Told nothing, ptxas waits for loads one after the other, to save registers for more.
// With two tiles of rows the registers of two blocks do not suffice.
constexpr int few_rows_blocks(int batch_tiles) { return batch_tiles == 1 ? 2 : 1; }

template <class Operands, int kBatchTiles, int kWarps, bool kGrouped>
__global__ void __launch_bounds__(kWarps* kWarpThreads, few_rows_blocks(kBatchTiles))
    few_rows_kernel(DeviceWeightLinear problem) {
  const DeviceLinear& linear = problem.linear;
  TRINE_SHARED_ARRAY(float, partial, kWarps * kBatchTiles * kTileSums);
  const int warp = int(threadIdx.x) / kWarpThreads, lane = int(threadIdx.x) % kWarpThreads;
  const int row = lane / 4, quarter = lane % 4;
  const int64_t n0 = int64_t(blockIdx.x) * kTileWeights;
  const int64_t steps = (linear.weight_stride + kStepValues - 1) / kStepValues;

  float totals[kBatchTiles][4] = {};
  for (int64_t first = warp; first < steps; first += kStepsInFlight * kWarps) {
    uint4 weight[kStepsInFlight][2] = {};
#pragma unroll
    for (int d = 0; d < kStepsInFlight; ++d)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t at = (first + d * kWarps) * kStepValues + quarter * 16;
        const int64_t n = n0 + half * 8 + row;
        if (at < linear.weight_stride && n < linear.n)
          weight[d][half] = load_global_once(linear.weight + n * linear.weight_stride + at);
      }
#pragma unroll
    for (int d = 0; d < kStepsInFlight; ++d) {
      const int64_t k = (first + d * kWarps) * kStepValues;
      uint4 x[kBatchTiles][2] = {};
#pragma unroll
      for (int b = 0; b < kBatchTiles; ++b)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t m = b * kTileBatch + row, at = 2 * (k + quarter * 16) + half * 16;
          if (m < linear.m && at < problem.x_bytes)
            load_global<16>(&x[b][half], linear.q + m * linear.q_stride + at);
        }
      float sums[kBatchTiles][4] = {};
#pragma unroll
      for (int product = 0; product < 4; ++product) {
        const uint32_t rows[2] = {word_of(weight[d][0], product), word_of(weight[d][1], product)};
        const uint32_t a[4] = {
            widen_codes<0>(Operands{}, rows[0]), widen_codes<0>(Operands{}, rows[1]),
            widen_codes<1>(Operands{}, rows[0]), widen_codes<1>(Operands{}, rows[1])};
#pragma unroll
        for (int b = 0; b < kBatchTiles; ++b) {
          const uint4& four = x[b][product / 2];
          const uint32_t columns[2] = {word_of(four, product % 2 * 2),
                                       word_of(four, product % 2 * 2 + 1)};
          multiply(Operands{}, kGrouped ? sums[b] : totals[b], a, columns);
        }
      }
      if constexpr (kGrouped) {
        if (k >= problem.k) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t n = n0 + half * 8 + row;
          if (n >= linear.n) continue;
          const float scale = linear.weight_scale[n * problem.groups + k / problem.group_size];
#pragma unroll
          for (int b = 0; b < kBatchTiles; ++b)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i)
              totals[b][i] = fmaf(sums[b][i], scale, totals[b][i]);
        }
      }
    }
  }
#pragma unroll
  for (int b = 0; b < kBatchTiles; ++b)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      partial[((warp * kBatchTiles + b) * kWarpThreads + lane) * 4 + i] = totals[b][i];
  __syncthreads();
  store_added_sums<1, kBatchTiles, kWarps>(
      linear, n0, 0, partial,
      [&](float sum, int64_t, int64_t n) { return finish_sum(problem, sum, n); });
}

// 32 k of the weight are two units of 16 bytes, swapped in every other four rows, so that the eight
// rows of a fragment fall in all 32 banks.
template <class Type>
struct WeightStage {
  using Operands = Type;
  using Sum = float;
  static constexpr int kStageRowBytes = kStageK / 2;
  static __device__ __forceinline__ uint32_t unit_offset_of(int row, int unit) {
    return uint32_t(row * kStageRowBytes + (unit ^ (row / 4 % 2)) * kCopyBytes);
  }
  static __device__ __forceinline__ void fragments(uint32_t (&b)[2], const unsigned char* stage,
                                                   int n, int step, int lane) {
    const unsigned char* const unit = stage + unit_offset_of(n + lane / 4, step);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      b[half] = widen_codes<0>(Type{},
                               *reinterpret_cast<const uint16_t*>(unit + 8 * half + lane % 4 * 2));
  }
};

template <class Type, class Tile, bool kGrouped>
__global__ void __launch_bounds__(Tile::kThreads) many_rows_kernel(DeviceWeightLinear problem) {
  using Weight = WeightStage<Type>;
  const DeviceLinear& linear = problem.linear;
  const int64_t row_tiles = (linear.m + Tile::kRows - 1) / Tile::kRows;
  const int64_t column_tiles = (linear.n + Tile::kColumns - 1) / Tile::kColumns;
  const RasterPosition tile =
      raster_position(blockIdx.x, uint32_t(row_tiles), uint32_t(column_tiles));
  const int64_t m0 = tile.row * Tile::kRows, n0 = tile.column * Tile::kColumns;
  const int64_t steps =
      (linear.weight_stride + Weight::kStageRowBytes - 1) / Weight::kStageRowBytes;

  const auto load = [&](unsigned char* a, unsigned char* b, int64_t step) {
    constexpr int kXUnits = kStageK / kCopyBytes, kUnits = Weight::kStageRowBytes / kCopyBytes;
    for (int i = int(threadIdx.x); i < Tile::kRows * kXUnits; i += Tile::kThreads) {
      const int row = i / kXUnits, unit = i % kXUnits;
      const int64_t at = step * kStageK + unit * kCopyBytes;
      copy_async(shared_address(a + unit_offset(row, unit)),
                 linear.q + (m0 + row) * linear.q_stride + at,
                 m0 + row < linear.m && at < problem.x_bytes);
    }
    for (int i = int(threadIdx.x); i < Tile::kColumns * kUnits; i += Tile::kThreads) {
      const int row = i / kUnits, unit = i % kUnits;
      const int64_t at = step * Weight::kStageRowBytes + unit * kCopyBytes;
      copy_async(shared_address(b + Weight::unit_offset_of(row, unit)),
                 linear.weight + (n0 + row) * linear.weight_stride + at,
                 n0 + row < linear.n && at < linear.weight_stride);
    }
  };
  using Sums = typename Tile::template Sums<float>;
  Sums sums = {}, totals = {};
  // The steps of a group are whole: its size is a multiple of two of them.
  const int64_t steps_of_group = problem.group_size / Weight::kStageRowBytes;
  multiply_stages<Tile, Weight>(steps, load, sums, [&](int64_t step) {
    if (!kGrouped || (step + 1) % steps_of_group != 0) return;
    const int64_t group = step / steps_of_group;
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t n = n0 + Tile::column_of(j, i);
        const float scale = n < linear.n ? linear.weight_scale[n * problem.groups + group] : 0.0f;
#pragma unroll
        for (int t = 0; t < Tile::kRowTiles; ++t)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& sum = sums[t][j][2 * half + i];
            totals[t][j][2 * half + i] = fmaf(sum, scale, totals[t][j][2 * half + i]);
            sum = 0.0f;
          }
      }
  });
  for_each_sum<Tile>(
      kGrouped ? totals : sums, linear.m - m0, linear.n - n0, [&](int m) { return m0 + m; },
      [&](int n) { return n0 + n; },
      [&](float sum, int64_t m, int64_t n) {
        write_float(linear.y, linear.type, m * linear.n + n, finish_sum(problem, sum, n));
      });
}

// fp32. Threads stand 16 x 16, each with kRows x 4 outputs; 16 k at a time pass shared memory.
constexpr int kSide = 16, kThreadColumns = 4, kFloatColumns = kSide * kThreadColumns;

template <int kRows>
__global__ void __launch_bounds__(kSide* kSide) float_kernel(DeviceWeightLinear problem) {
  constexpr int kTileRows = kSide * kRows, kStride = kSide + 1;  // in different banks
  const DeviceLinear& linear = problem.linear;
  TRINE_SHARED_ARRAY(float, x, kTileRows* kStride);
  TRINE_SHARED_ARRAY(float, weight, kFloatColumns* kStride);
  const auto column_tiles = uint32_t((linear.n + kFloatColumns - 1) / kFloatColumns);
  const int64_t m0 = int64_t(blockIdx.x / column_tiles) * kTileRows;
  const int64_t n0 = int64_t(blockIdx.x % column_tiles) * kFloatColumns;
  const int across = int(threadIdx.x) % kSide, down = int(threadIdx.x) / kSide;

  float sums[kRows][kThreadColumns] = {}, totals[kRows][kThreadColumns] = {};
  for (int64_t k = 0; k < problem.k; k += kSide) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t m = m0 + i * kSide + down;
      const bool known = m < linear.m && k + across < problem.k;
      x[(i * kSide + down) * kStride + across] =
          known ? reinterpret_cast<const float*>(linear.q + m * linear.q_stride)[k + across] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kThreadColumns; ++j) {
      const int64_t n = n0 + j * kSide + down;
      const bool known = n < linear.n && k + across < problem.k;
      weight[(j * kSide + down) * kStride + across] =
          known ? float(int8_t(linear.weight[n * linear.weight_stride + k + across])) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kSide; ++c)
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kThreadColumns; ++j)
          sums[i][j] = fmaf(x[(i * kSide + down) * kStride + c],
                            weight[(j * kSide + across) * kStride + c], sums[i][j]);
    __syncthreads();
    if (problem.groups == 1 || (k + kSide) % problem.group_size != 0) continue;
#pragma unroll
    for (int j = 0; j < kThreadColumns; ++j) {
      const int64_t n = n0 + j * kSide + across;
      const float scale =
          n < linear.n ? linear.weight_scale[n * problem.groups + k / problem.group_size] : 0.0f;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        totals[i][j] = fmaf(sums[i][j], scale, totals[i][j]);
        sums[i][j] = 0.0f;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kThreadColumns; ++j) {
      const int64_t m = m0 + i * kSide + down, n = n0 + j * kSide + across;
      if (m < linear.m && n < linear.n)
        static_cast<float*>(linear.y)[m * linear.n + n] =
            finish_sum(problem, problem.groups == 1 ? sums[i][j] : totals[i][j], n);
    }
}

int64_t pieces(int64_t count, int64_t size) { return (count + size - 1) / size; }

template <class Type>
void few_rows(const DeviceWeightLinear& problem, cudaStream_t stream) {
  const auto run = [&]<int kBatchTiles, bool kGrouped>() {
    launch(kOp, few_rows_kernel<Type, kBatchTiles, kFewRowsWarps, kGrouped>,
           {pieces(problem.linear.n, kTileWeights), kFewRowsWarps * kWarpThreads}, stream, problem);
  };
  const bool one = problem.linear.m <= kTileBatch, grouped = problem.groups > 1;
  if (one)
    grouped ? run.template operator()<1, true>() : run.template operator()<1, false>();
  else
    grouped ? run.template operator()<2, true>() : run.template operator()<2, false>();
}

template <class Type>
void many_rows(const DeviceWeightLinear& problem, cudaStream_t stream) {
  using Small = TileShape<2, 2, 2>;  // 64 x 64
  const auto tiles = [&]<class Tile>(Tile) {
    return pieces(problem.linear.m, Tile::kRows) * pieces(problem.linear.n, Tile::kColumns);
  };
  const auto run = [&]<class Tile, bool kGrouped>() {
    launch(kOp, many_rows_kernel<Type, Tile, kGrouped>,
           {tiles(Tile{}), Tile::kThreads,
            kManyRowsStages * Tile::template kStageBytes<WeightStage<Type>>},
           stream, problem);
  };
  if (problem.groups > 1)
    run.template operator()<Small, true>();
  else if (tiles(LinearTile{}) < multiprocessors())
    run.template operator()<Small, false>();
  else
    run.template operator()<LinearTile, false>();
}

void of_float(const DeviceWeightLinear& problem, cudaStream_t stream) {
  const auto run = [&]<int kRows>() {
    const int64_t blocks =
        pieces(problem.linear.m, kSide * kRows) * pieces(problem.linear.n, kFloatColumns);
    launch(kOp, float_kernel<kRows>, {blocks, kSide * kSide}, stream, problem);
  };
  problem.linear.m <= kSide ? run.template operator()<1>() : run.template operator()<4>();
}

}  // namespace

void int8_weight_linear_cuda(const DeviceWeightLinear& problem, cudaStream_t stream) {
  if (problem.linear.m == 0 || problem.linear.n == 0) return;
  const bool few = problem.linear.m <= kWeightFewRows;
  switch (problem.linear.type) {
    case FloatType::float32:
      return of_float(problem, stream);
    case FloatType::float16:
      return few ? few_rows<F16>(problem, stream) : many_rows<F16>(problem, stream);
    case FloatType::bfloat16:
      return few ? few_rows<Bf16>(problem, stream) : many_rows<Bf16>(problem, stream);
  }
}

}  // namespace trine
