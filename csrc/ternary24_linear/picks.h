// Several activation rows on AVX-512 VNNI and VBMI: only values that are there are multiplied. The
// weight is not spread out to the columns of x; the columns that a weight row names are picked from
// x instead, as in sparse24_linear/avx512vbmi.cpp:
//
//   x      64 columns, a register in which vpermb finds any byte
//   picks  the first (or the second) value of each of the 16 groups there of four weight rows, a
//   row
//          in each 128-bit lane: a place among the 64 columns
//   acc = vpdpbusd(acc, vpermb(picks, x), values of picks)
//
// so that two picks and two dot products stand for the four dot products of dense codes, and a lane
// of the sums is a weight row. x is the unsigned operand, by adding 128; 128 times the sum of a
// weight row is taken off again. The picks of a block of weight rows are made once, to a panel half
// as large as dense bytes, which stays in L2.
//
// What bounds it: the units that pick or multiply. On Zen 4 one of 256 bits does the one, one the
// other and one both, which makes 2.7 cycles for 256 weights and a row of x; dense products take 4.
// Measured at 2560 x 2560: 3.6, and 9 to make the picks of 256 weights. Making them anew for every
// eight rows, in registers, took longer.
#pragma once

#include <algorithm>
#include <limits>

#include "common/x86/gemm_avx512vnni.h"
#include "ternary24_linear/ternary24_linear.h"

namespace trine {
namespace {

// 64 columns of four weight rows. vpermb heeds the lowest six bits of a byte, its place; the
// highest two are its value, 64 times too large: 64, -64, or 0 for none.
struct Picks {
  __m512i first, second;
};

struct Table64 {
  alignas(64) uint8_t entry[64];
};
template <class Entry>
constexpr Table64 make_table(const Entry& entry) {
  Table64 table{};
  for (uint32_t group = 0; group < 64; ++group)
    table.entry[group] = static_cast<uint8_t>(entry(group));
  return table;
}
// The column of a value in its group, and the value.
constexpr uint32_t pick(uint32_t column, bool is_minus) {
  return column | (is_minus ? 0xc0 : 0x40);
}
// Where both values are in one column, the first is what the group is, and there is no second.
constexpr bool in_one_column(uint32_t group) {
  return (group & 3) == (group >> 3 & 3) && (group & 3) != 0 && (group & 3) != 3;
}
inline constexpr Table64 kFirst = make_table([](uint32_t group) -> uint32_t {
  if ((group & 3) == 3) return 0;
  return pick(group & 3, in_one_column(group) ? (group & 36) == 36 : (group & 4) != 0);
});
inline constexpr Table64 kSecond = make_table([](uint32_t group) -> uint32_t {
  if ((group >> 3 & 3) == 0 || in_one_column(group)) return 0;
  return pick(group >> 3 & 3, (group & 32) != 0);
});

// From six bytes in each qword its eight groups: byte i takes the bits from 6i on, of which a
// look-up heeds six.
[[gnu::always_inline]] inline __m512i spread_groups(__m512i sixes) {
  return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x2a241e18120c0600), sixes);
}

// From 12 bytes at the beginning of each lane.
[[gnu::always_inline]] inline Picks make_picks(__m512i packed) {
  const __m512i bytes =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, -1, -1, 6, 7, 8, 9, 10, 11, -1, -1));
  const __m512i place = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60));
  const __m512i groups = spread_groups(_mm512_shuffle_epi8(packed, bytes));
  return {
      _mm512_or_si512(_mm512_permutexvar_epi8(groups, _mm512_load_si512(kFirst.entry)), place),
      _mm512_or_si512(_mm512_permutexvar_epi8(groups, _mm512_load_si512(kSecond.entry)), place)};
}

// How far ahead of its reading the weight is prefetched.
inline constexpr int64_t kPanelAhead = 4 << 10;

// A panel of them: rows from `first_n` on, four by four, `steps` of 64 columns each.
struct PanelFours {
  static constexpr int32_t kOffset = 0;
  static constexpr int64_t kMaxTileRows = 8;

  const Picks* data;
  int64_t steps;
  int64_t first_n;

  const Picks* row(int64_t n) const { return data + (n - first_n) / kTileColumns * steps; }
};

[[gnu::always_inline]] inline __m512i values(__m512i picks) {
  return _mm512_and_si512(picks, _mm512_set1_epi8(static_cast<char>(0xc0)));
}

// gcc would rather load an operand from L1 again at each use than keep it.
[[gnu::always_inline]] inline __m512i in_register(__m512i v) {
  asm("" : "+v"(v));
  return v;
}

template <int kRows>
void accumulate_tile(const PanelFours& weight, const TileRows& x, int64_t n, int64_t,
                     const Slice& k, int32_t* sums) {
  constexpr int kFours = (kRows + 3) / 4;
  Int32x16 acc[4 * kFours];
  unrolled<4 * kFours>([&](auto i) { acc[i] = Int32x16{}; });
  const Picks* picks = weight.row(n) + k.begin / 64;
  for (int64_t at = k.begin; at < k.end; at += 64, ++picks) {
    const __m512i first = in_register(picks->first), second = in_register(picks->second);
    const __m512i first_values = values(first), second_values = values(second);
    unrolled<kRows>([&](auto i) __attribute__((always_inline)) {
      const __m512i q = in_register(_mm512_load_si512(x.q + i * x.stride + at));
      acc[i] = dot(acc[i], _mm512_permutexvar_epi8(first, q), first_values);
      acc[i] = dot(acc[i], _mm512_permutexvar_epi8(second, q), second_values);
    });
  }

  // A slice of k is short enough for sums 64 times too large.
  static_assert(slice_k(1, 1) / 2 * 255 * 64 < std::numeric_limits<int32_t>::max());
  unrolled<kRows>([&](auto i) { acc[i] >>= 6; });
  unrolled<kFours>([&](auto piece) {
    constexpr int first = 4 * piece;
    // Quarter j holds the sums of weight row j; transposed, quarter i those of activation row i.
    const __m512i by_column = sum_within_quarters((__m512i)acc[first], (__m512i)acc[first + 1],
                                                  (__m512i)acc[first + 2], (__m512i)acc[first + 3]);
    const __m512i by_row = _mm512_permutexvar_epi32(
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), by_column);
    unrolled<std::min(4, kRows - first)>([&](auto i) {
      auto* row = reinterpret_cast<__m128i*>(sums + (first + i) * kMaxBlockColumns);
      _mm_store_si128(row,
                      _mm_add_epi32(_mm_load_si128(row), _mm512_extracti32x4_epi32(by_row, i)));
    });
  });
}

// Makes the picks of rows n .. n_end - 1; minus[i] = 128 * the sum of row n + i.
[[maybe_unused]] inline void make_panel(const Ternary24Weight& weight, int64_t n, int64_t n_end,
                                        Picks* to, int32_t* minus) {
  // A step takes 12 bytes of a row and reads 16, but for the last, where the row may end.
  const int64_t steps = (weight.k + 63) / 64, last = 12 * (steps - 1);
  const auto last_dwords =
      static_cast<__mmask8>((1 << std::min<int64_t>((weight.stride - last) / 4, 4)) - 1);
  for (; n < n_end; n += kTileColumns, minus += kTileColumns) {
    const uint8_t* row[kTileColumns];  // beyond the last it repeats; those sums are never read
    for (int64_t i = 0; i < kTileColumns; ++i)
      row[i] = weight.packed + std::min(n + i, n_end - 1) * weight.stride;
    Int32x16 sum{};
    const auto write = [&](const auto& load) __attribute__((always_inline)) {
      __m512i packed = _mm512_castsi128_si512(load(row[0]));
      packed = _mm512_mask_broadcast_i32x4(packed, 0x00f0, load(row[1]));
      packed = _mm512_mask_broadcast_i32x4(packed, 0x0f00, load(row[2]));
      packed = _mm512_mask_broadcast_i32x4(packed, 0xf000, load(row[3]));
      *to = make_picks(packed);
      const __m512i twos = _mm512_set1_epi8(2);  // 2 * 64 * value
      sum = dot(dot(sum, twos, values(to->first)), twos, values(to->second));
      ++to;
    };
    for (int64_t at = 0; at < last; at += 12) {
      // In the order of memory, in which the steps of four rows follow on one another.
      _mm_prefetch(row[0] + kPanelAhead + 4 * at, _MM_HINT_T1);
      write([&](const uint8_t* from) __attribute__((always_inline)) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at));
      });
    }
    if (steps > 0)
      write([&](const uint8_t* from) __attribute__((always_inline)) {
        return _mm_maskz_loadu_epi32(last_dwords, from + last);
      });
    const __m512i sums =
        sum_within_quarters((__m512i)sum, (__m512i)sum, (__m512i)sum, (__m512i)sum);
    const __m512i each = _mm512_permutexvar_epi32(
        _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), sums);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(minus), _mm512_castsi512_si128(each));
  }
}

// All of `tile`; x holds q + 128.
[[maybe_unused]] inline void linear_by_picks(const QuantizedRows& x, const Ternary24Weight& weight,
                                             const LinearOutput& out, const Tile& tile) {
  const int64_t steps = (weight.k + 63) / 64, columns = block_columns(32 * steps);
  const Scratch storage(columns / kTileColumns * steps * int64_t(sizeof(Picks)) +
                        columns * int64_t(sizeof(int32_t)));
  auto* picks = storage.data<Picks>();
  auto* minus = reinterpret_cast<int32_t*>(picks + columns / kTileColumns * steps);
  for (int64_t n = tile.n_begin; n < tile.n_end; n += columns) {
    const int64_t n_end = std::min(n + columns, tile.n_end);
    make_panel(weight, n, n_end, picks, minus);
    few_rows_linear(x, PanelFours{picks, steps, n}, weight.k,
                    {weight.scale, weight.per_tensor, minus}, out,
                    {tile.m_begin, tile.m_end, n, n_end});
  }
}

}  // namespace
}  // namespace trine
