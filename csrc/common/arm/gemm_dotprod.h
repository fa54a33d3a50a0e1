// Integer matrix products on Arm's dot products (Armv8.2-A with dotprod): int8 activations, and
// weights read as signed bytes.
//
//   y[m][n] = narrow(((float(acc) * x.scale[m]) * weight_scale[n]) + bias[n])
//   acc     = sum over k of (byte[n][k] - kOffset) * q[m][k]           (exact)
//
// sdot multiplies 16 signed by 16 signed bytes and adds fours of them to four int32 lanes, without
// saturation. INT8 weights therefore carry no offset; ternary codes 0, 1, 2 carry 1, which costs
// one subtraction of x.sum[m] per output.
//
// A weight is read 64 columns at a time, in four quarters of 16. Its type has
//   static constexpr int32_t kOffset;
//   static constexpr int64_t kMaxTileRows;   // rows of x in a tile, by the registers left for sums
//   int64_t whole_k;                         // multiple of 64: fetch may be used below it
//   Row row(int64_t n) const;                // a handle of row n, of any kind
//   fetch(Row, int64_t k) const              // what the quarters of k .. k + 63 are made of
//   fetch_tail(Row, int64_t k) const         // the same at whole_k, if k goes beyond it
//   template <int i> quarter(fetched)        // bytes of columns 16 i .. 16 i + 15, or of others in
//                                            // the order in which x has been arranged
// and may have
//   static constexpr int64_t kPanelRows;     // from how many rows of x on it is decoded to a panel
//   kShift[4], in_place<i>(fetched)          // quarter i cheaper, but 2^kShift[i] times too large
//   static Bytes64 arranged(q)               // 64 activations in the order of its quarters
//   void prefetch(Row, int64_t k) const      // called with each fetch
//
// Call dotprod_linear(x, weight, k, scaling, out, tile). x.q is zero from k to a multiple of 64.
//
// What bounds it, by counting instructions (it has not been timed): with many rows, the sdot, of
// which a Neoverse N1 starts two per cycle and a V1 four: a step of a 6 x 4 tile is 24 of them on
// ten loads. With one row, the loads: five for four sdot, which both processors start as fast as 64
// (N1) or 96 (V1) bytes of weight per four cycles, more than a core reads from memory.
#pragma once

#include <arm_neon.h>

#include "common/arm/float_neon.h"
#include "common/gemm_blocking.h"

namespace trine {
namespace {

struct Bytes64 {
  int8x16_t quarter[4];
};

// Rows of bytes in memory, `stride` apart, a multiple of 16; row `first_n` at `data`.
template <int32_t offset>
struct ByteRows {
  static constexpr int32_t kOffset = offset;
  static constexpr int64_t kMaxTileRows = 6;  // 24 sums, and 5 of the 8 other registers
  using Row = const int8_t*;

  Row data;
  int64_t stride;
  int64_t first_n = 0;
  int64_t whole_k = stride / 64 * 64;

  Row row(int64_t n) const { return data + (n - first_n) * stride; }
  static Row fetch(Row row, int64_t k) { return row + k; }
  Bytes64 fetch_tail(Row row, int64_t k) const {
    Bytes64 bytes;
    for (int i = 0; i < 4; ++i)
      bytes.quarter[i] = k + 16 * i < stride ? vld1q_s8(row + k + 16 * i) : vdupq_n_s8(0);
    return bytes;
  }
  template <int i>
  static int8x16_t quarter(Row columns) {
    return vld1q_s8(columns + 16 * i);
  }
  template <int i>
  static int8x16_t quarter(const Bytes64& columns) {
    return columns.quarter[i];
  }
};

// Packed INT8 rows, int8 [n][stride], as they lie. Each line of the next tile is asked for one tile
// ahead: rows are short for a processor's own prefetcher. That has been measured on x86 only; where
// it is of no use it costs 1 instruction in 17. Beyond the memory it is harmless.
struct PackedInt8Weight : ByteRows<0> {
  void prefetch(Row row, int64_t k) const { __builtin_prefetch(row + kTileColumns * stride + k); }
};

// A single row of x leaves registers for a sum of each quarter, whose bytes may then be too large.
template <int kRows, class Weight>
inline constexpr int kParts = 1;
template <class Weight>
  requires requires { Weight::kShift; }
inline constexpr int kParts<1, Weight> = 4;

template <int kRows, int i, class Weight, class Fetched>
[[gnu::always_inline]] inline int8x16_t quarter_for_rows(const Fetched& fetched) {
  if constexpr (kParts<kRows, Weight> == 4)
    return Weight::template in_place<i>(fetched);
  else
    return Weight::template quarter<i>(fetched);
}

template <int kRows, class Weight>
[[gnu::always_inline]] inline int32x4_t sum_parts(const int32x4_t* parts) {
  int32x4_t sum = parts[0];
  if constexpr (kParts<kRows, Weight> == 4)
    unrolled<3>([&](auto i) {
      sum = vaddq_s32(sum, vshlq_s32(parts[i + 1], vdupq_n_s32(-Weight::kShift[i + 1])));
    });
  return sum;
}

// The sums of the lanes of each of four vectors.
[[maybe_unused]] inline int32x4_t sum_lanes(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d) {
  return vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d));
}

template <int kRows, class Weight>
void accumulate_tile(const Weight& weight, const TileRows& x, int64_t n, int64_t last_n,
                     const Slice& k, int32_t* sums) {
  // Columns beyond the last repeat it; their sums are never read.
  const typename Weight::Row rows[kTileColumns] = {
      weight.row(n), weight.row(std::min(n + 1, last_n)), weight.row(std::min(n + 2, last_n)),
      weight.row(std::min(n + 3, last_n))};

  int32x4_t acc[kRows][kTileColumns][kParts<kRows, Weight>] = {};
  // fetched(column) gives what the weight's quarters are made of.
  const auto step = [&](int64_t at, const auto& fetched) __attribute__((always_inline)) {
    if constexpr (kRows <= 2) {  // registers hold the activations
      int8x16_t q[kRows][4];
      unrolled<kRows>([&](auto m) __attribute__((always_inline)) {
        unrolled<4>([&](auto i) __attribute__((always_inline)) {
          q[m][i] = vld1q_s8(x.q + m * x.stride + at + 16 * i);
        });
      });
      unrolled<kTileColumns>([&](auto column) __attribute__((always_inline)) {
        const auto w = fetched(column);
        unrolled<4>([&](auto i) __attribute__((always_inline)) {
          const int8x16_t bytes = quarter_for_rows<kRows, i, Weight>(w);
          unrolled<kRows>([&](auto m) __attribute__((always_inline)) {
            int32x4_t& sum = acc[m][column][i % kParts<kRows, Weight>];
            sum = vdotq_s32(sum, bytes, q[m][i]);
          });
        });
      });
    } else {  // registers hold the weight
      const auto w0 = fetched(std::integral_constant<int, 0>());
      const auto w1 = fetched(std::integral_constant<int, 1>());
      const auto w2 = fetched(std::integral_constant<int, 2>());
      const auto w3 = fetched(std::integral_constant<int, 3>());
      unrolled<4>([&](auto i) __attribute__((always_inline)) {
        const int8x16_t b0 = Weight::template quarter<i>(w0);
        const int8x16_t b1 = Weight::template quarter<i>(w1);
        const int8x16_t b2 = Weight::template quarter<i>(w2);
        const int8x16_t b3 = Weight::template quarter<i>(w3);
        unrolled<kRows>([&](auto m) __attribute__((always_inline)) {
          const int8x16_t q = vld1q_s8(x.q + m * x.stride + at + 16 * i);
          acc[m][0][0] = vdotq_s32(acc[m][0][0], b0, q);
          acc[m][1][0] = vdotq_s32(acc[m][1][0], b1, q);
          acc[m][2][0] = vdotq_s32(acc[m][2][0], b2, q);
          acc[m][3][0] = vdotq_s32(acc[m][3][0], b3, q);
        });
      });
    }
  };

  const int64_t whole_end = std::min(k.end, weight.whole_k);
  int64_t at = k.begin;
  for (; at < whole_end; at += 64) {
    if constexpr (requires { weight.prefetch(rows[0], at); })
      for (const auto row : rows) weight.prefetch(row, at);
    step(at, [&](auto column)
                 __attribute__((always_inline)) { return weight.fetch(rows[column], at); });
  }
  if (at < k.end)
    step(at, [&](auto column)
                 __attribute__((always_inline)) { return weight.fetch_tail(rows[column], at); });

  unrolled<kRows>([&](auto m) {
    int32_t* row = sums + m * kMaxBlockColumns;
    const int32x4_t sum =
        sum_lanes(sum_parts<kRows, Weight>(acc[m][0]), sum_parts<kRows, Weight>(acc[m][1]),
                  sum_parts<kRows, Weight>(acc[m][2]), sum_parts<kRows, Weight>(acc[m][3]));
    vst1q_s32(row, vaddq_s32(vld1q_s32(row), sum));
  });
}

template <class T>
void store_values(const Finish& f, const float* values, T* y, int64_t y_stride) {
  for (int64_t i = 0; i < f.rows; ++i, values += f.columns)
    for (int64_t n = 0; n < f.columns; n += 8)
      store_floats(load_floats(values + n, f.columns - n), y + i * y_stride + n, f.columns - n);
}

// Adding -0 changes no float, as no bias must.
template <class Weight, class T>
void finish_sums(const Weight&, const Finish& f, T* y, int64_t y_stride) {
  const auto subtract = [](int32x4_t a, int32x4_t b) { return vsubq_s32(a, b); };
  const auto multiply = [](float32x4_t a, float32x4_t b) { return vmulq_f32(a, b); };
  const auto add = [](float32x4_t a, float32x4_t b) { return vaddq_f32(a, b); };
  // Not vmaxq, which has no -0 beside 0.
  const auto at_least = [](float32x4_t least, float32x4_t a) {
    return vbslq_f32(vcltq_f32(a, least), least, a);
  };
  for (int64_t n = 0; n < f.columns; n += 8) {
    const int64_t lanes = std::min<int64_t>(8, f.columns - n);
    const Ints column_minus =
        f.column_minus == nullptr ? all_lanes(int32_t{0}) : load_ints(f.column_minus + n, lanes);
    const Floats weight_scale =
        f.per_tensor ? all_lanes(*f.weight_scale) : load_floats(f.weight_scale + n, lanes);
    const Floats bias = f.bias == nullptr ? all_lanes(-0.0f) : load_floats(f.bias + n, lanes);
    for (int64_t i = 0; i < f.rows; ++i) {
      const Ints minus = all_lanes(wrapping_product(f.offset, f.x_sum[i]));
      Ints acc = both<Ints>(subtract, load_ints(f.sums + i * f.sums_stride + n), minus);
      acc = both<Ints>(subtract, acc, column_minus);
      Floats value = both<Floats>([](int32x4_t a) { return vcvtq_f32_s32(a); }, acc);
      value = both<Floats>(multiply, value, all_lanes(f.x_scale[i]));
      value = both<Floats>(add, both<Floats>(multiply, value, weight_scale), bias);
      value = both<Floats>(at_least, all_lanes(f.least), value);
      store_floats(value, y + i * y_stride + n, lanes);
    }
  }
}

// Calls run(columns, scaling) for blocks of columns of a tile, scaling being that of the block.
template <class Run>
void for_blocks(int64_t k, const Scaling& scaling, const Tile& tile, const Run& run) {
  const int64_t columns = block_columns(k);
  for (int64_t n = tile.n_begin; n < tile.n_end; n += columns) {
    Scaling block = scaling;
    if (block.column_minus != nullptr) block.column_minus += n - tile.n_begin;
    run(Tile{tile.m_begin, tile.m_end, n, std::min(n + columns, tile.n_end)}, block);
  }
}

// Calls visit(k, fetched) for every 64 columns of a row.
template <class Weight, class Row, class Visit>
void for_row(const Weight& weight, const Row& row, int64_t k, const Visit& visit) {
  int64_t at = 0;
  for (; at < std::min(k, weight.whole_k); at += 64) visit(at, weight.fetch(row, at));
  if (at < k) visit(at, weight.fetch_tail(row, at));
}

// Part of a call: the rows of a tile, numbered from 0, with their activations at `q`.
struct TileCall {
  QuantizedRows x;
  LinearOutput out;
  Tile tile;
};

[[maybe_unused]] inline TileCall with_activations(const int8_t* q, const QuantizedRows& x,
                                                  const LinearOutput& out, const Tile& tile) {
  TileCall call{{q, x.stride, x.scale + tile.m_begin, x.sum + tile.m_begin},
                out,
                {0, tile.m_end - tile.m_begin, tile.n_begin, tile.n_end}};
  const int64_t value_bytes = out.type == FloatType::float32 ? 4 : 2;
  call.out.y = static_cast<char*>(out.y) + tile.m_begin * out.stride * value_bytes;
  return call;
}

// A weight that is decoded, for many rows of x is decoded once, to a panel of bytes that stays in
// L2 while all of them pass.
template <class Weight>
void dotprod_arranged(const Weight& weight, int64_t k, const Scaling& scaling,
                      const QuantizedRows& x, const LinearOutput& out, const Tile& tile) {
  if constexpr (requires { Weight::kPanelRows; }) {
    if (tile.m_end - tile.m_begin >= Weight::kPanelRows) {
      const int64_t stride = round_up(k, 64);
      const Scratch storage(block_columns(stride) * stride);
      int8_t* panel = storage.data<int8_t>();
      for_blocks(stride, scaling, tile, [&](const Tile& block, const Scaling& block_scaling) {
        for (int64_t n = block.n_begin; n < block.n_end; ++n) {
          int8_t* to = panel + (n - block.n_begin) * stride;
          for_row(weight, weight.row(n), k, [&](int64_t at, const auto& fetched) {
            unrolled<4>(
                [&](auto i) { vst1q_s8(to + at + 16 * i, Weight::template quarter<i>(fetched)); });
          });
        }
        integer_linear(x, ByteRows<Weight::kOffset>{panel, stride, block.n_begin}, k, block_scaling,
                       out, block);
      });
      return;
    }
  }
  integer_linear(x, weight, k, scaling, out, tile);
}

// Calls run(x, out, tile) with the tile's activations in the order of the weight's quarters.
template <class Weight, class Run>
void with_arranged_rows(const QuantizedRows& x, const LinearOutput& out, const Tile& tile,
                        const Run& run) {
  if constexpr (requires { Weight::arranged(x.q); }) {
    const int64_t bytes = (tile.m_end - tile.m_begin) * x.stride;
    const Scratch storage(bytes);
    int8_t* to = storage.data<int8_t>();
    const int8_t* from = x.q + tile.m_begin * x.stride;
    for (int64_t at = 0; at < bytes; at += 64) {
      const Bytes64 columns = Weight::arranged(from + at);
      for (int i = 0; i < 4; ++i) vst1q_s8(to + at + 16 * i, columns.quarter[i]);
    }
    const TileCall call = with_activations(to, x, out, tile);
    run(call.x, call.out, call.tile);
  } else {
    run(x, out, tile);
  }
}

template <class Weight>
void dotprod_linear(const QuantizedRows& x, const Weight& weight, int64_t k, const Scaling& scaling,
                    const LinearOutput& out, const Tile& tile) {
  with_arranged_rows<Weight>(x, out, tile, [&](const auto&... arranged) {
    dotprod_arranged(weight, k, scaling, arranged...);
  });
}

}  // namespace
}  // namespace trine
