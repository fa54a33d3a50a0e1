// The loops around the integer tiles: a Tile of y from int8 activations and a weight, cut so that
// what is read again lies in the caches. It serves every instruction set: include it through
// gemm_avx512vnni.h or gemm_avx2.h, whose first comment says how a kernel uses it.
//
//   for a block of weight rows (they stay in L2)
//     for a tile of activation rows
//       for a slice of k (the tile's slice stays in L1)
//         for kTileColumns weight rows: accumulate_tile   -> int32 sums of the tile
//       finish_row                                        -> y
//
// A Weight has `kOffset` (what its values carry above the true ones), `kMaxTileRows` (the highest
// tile there are registers for), `kRowStep` where a tile must begin at a multiple of so many rows,
// and two functions beside it, found by its type:
//   accumulate_tile<rows>(weight, x, n, last_n, k, sums)  sums[i][j] += row i of x . row n+j of w
//   finish_row(weight, sums, count, row, y)               scales `count` sums and writes them
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/linear.h"
#include "common/scratch.h"

namespace trine {
namespace {

// Weight rows per tile. With six activation rows that makes 24 sums, more than enough independent
// ones to hide the latency of a dot product, and leaves eight zmm registers for operands.
inline constexpr int64_t kTileColumns = 4;
// Six rows of this much k are 24 KiB: they stay in a 32 KiB L1 while weight rows pass by.
inline constexpr int64_t kSliceK = 4096;
// A block of weight rows takes half of a 1 MiB L2, beside activations and output.
inline constexpr int64_t kBlockBytes = 1 << 19;
inline constexpr int64_t kMaxBlockColumns = 256;

// How many weight rows of k bytes make a block: a multiple of 16.
[[maybe_unused]] inline int64_t block_columns(int64_t k) {
  const int64_t rows = kBlockBytes / std::max<int64_t>(k, 1) / 16 * 16;
  return std::clamp<int64_t>(rows, 16, kMaxBlockColumns);
}

// body(0), body(1), ... body(kCount - 1) with constants: gcc keeps an array in registers only where
// no index into it is a variable when it first looks.
template <int kCount, class Body>
[[gnu::always_inline]] inline void unrolled(const Body& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

// Consecutive activation rows. Each is zero from the end of k to the next multiple of 64.
struct TileRows {
  const int8_t* q;
  int64_t stride;
};

// A part of k; both ends are multiples of 64.
struct Slice {
  int64_t begin, end;
};

// How sums become outputs.
struct Scaling {
  const float* weight_scale;              // [n] as the output, or one value
  bool per_tensor = false;                // weight_scale is one value
  const int32_t* column_minus = nullptr;  // [n] from tile.n_begin, subtracted from acc; or null
};

// The same for a piece of one output row; the pointers stand at its first column.
struct RowScaling {
  int32_t minus;  // of every sum
  const int32_t* column_minus;
  float x_scale;
  const float* weight_scale;
  bool per_tensor;
  const float* bias;
};

template <int kRows, class Weight>
void accumulate_rows(int64_t rows, const Weight& weight, const TileRows& x, int64_t n,
                     int64_t last_n, const Slice& k, int32_t* sums) {
  if (rows == kRows) return accumulate_tile<kRows>(weight, x, n, last_n, k, sums);
  if constexpr (kRows > 1) accumulate_rows<kRows - 1>(rows, weight, x, n, last_n, k, sums);
}

// Row i of the sums starts at sums + i * kMaxBlockColumns. The offset is still in them, and up to
// kTileColumns - 1 meaningless sums follow the last column.
template <class Weight>
void accumulate_block(int64_t rows, const Weight& weight, const TileRows& x, int64_t n_begin,
                      int64_t n_end, int64_t k, int32_t* sums) {
  for (int64_t i = 0; i < rows; ++i)
    std::fill_n(sums + i * kMaxBlockColumns, round_up(n_end - n_begin, kTileColumns), 0);
  for (int64_t begin = 0; begin < k; begin += kSliceK) {
    const Slice slice{begin, round_up(std::min(begin + kSliceK, k), 64)};
    for (int64_t n = n_begin; n < n_end; n += kTileColumns)
      accumulate_rows<Weight::kMaxTileRows>(rows, weight, x, n, n_end - 1, slice,
                                            sums + (n - n_begin));
  }
}

// Products wrap modulo 2^32, as the sums do; the difference is the true sum again.
[[maybe_unused]] inline int32_t wrapping_product(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b));
}

template <class Weight>
void finish_block(const Weight& weight, const int32_t* sums, const RowScaling& row,
                  const LinearOutput& out, int64_t m, int64_t n, int64_t count) {
  const int64_t at = m * out.stride + n;
  switch (out.type) {
    case FloatType::float32:
      return finish_row(weight, sums, count, row, static_cast<float*>(out.y) + at);
    case FloatType::bfloat16:
      return finish_row(weight, sums, count, row, static_cast<bfloat16*>(out.y) + at);
    case FloatType::float16:
      return finish_row(weight, sums, count, row, static_cast<float16*>(out.y) + at);
  }
}

// Computes the outputs of `tile`. `k` is the true number of columns.
template <class Weight>
void integer_linear(const QuantizedRows& x, const Weight& weight, int64_t k, const Scaling& scaling,
                    const LinearOutput& out, const Tile& tile) {
  alignas(64) int32_t sums[Weight::kMaxTileRows * kMaxBlockColumns];
  const int64_t columns = block_columns(k);
  for (int64_t n = tile.n_begin; n < tile.n_end; n += columns) {
    const int64_t n_end = std::min(n + columns, tile.n_end);
    for (int64_t m = tile.m_begin; m < tile.m_end;) {
      // Rows are shared out evenly: 8 are 4 + 4, not 6 + 2.
      const int64_t left = tile.m_end - m;
      const int64_t tiles = (left + Weight::kMaxTileRows - 1) / Weight::kMaxTileRows;
      int64_t rows = (left + tiles - 1) / tiles;
      if constexpr (requires { Weight::kRowStep; })
        rows = std::min(round_up(rows, Weight::kRowStep), left);
      accumulate_block(rows, weight, {x.q + m * x.stride, x.stride}, n, n_end, k, sums);
      for (int64_t i = 0; i < rows; ++i, ++m) {
        const RowScaling row{
            wrapping_product(Weight::kOffset, x.sum[m]),
            scaling.column_minus == nullptr ? nullptr : scaling.column_minus + (n - tile.n_begin),
            x.scale[m],
            scaling.per_tensor ? scaling.weight_scale : scaling.weight_scale + n,
            scaling.per_tensor,
            out.bias == nullptr ? nullptr : out.bias + n};
        finish_block(weight, sums + i * kMaxBlockColumns, row, out, m, n, n_end - n);
      }
    }
  }
}

// row_sums[n - n_begin] = the sum of weight row n over k: its product with a row of ones.
template <class Weight>
void sum_weight_rows(const Weight& weight, int64_t k, int64_t n_begin, int64_t n_end,
                     int32_t* row_sums) {
  const Scratch ones(round_up(k, 64));
  std::fill_n(ones.data<int8_t>(), round_up(k, 64), int8_t{0});
  std::fill_n(ones.data<int8_t>(), k, int8_t{1});
  alignas(64) int32_t sums[kMaxBlockColumns];
  for (int64_t n = n_begin; n < n_end; n += kMaxBlockColumns) {
    const int64_t count = std::min(kMaxBlockColumns, n_end - n);
    accumulate_block(1, weight, {ones.data<int8_t>(), 0}, n, n + count, k, sums);
    for (int64_t j = 0; j < count; ++j)
      row_sums[n - n_begin + j] = sums[j] - wrapping_product(Weight::kOffset, int32_t(k));
  }
}

}  // namespace
}  // namespace trine
