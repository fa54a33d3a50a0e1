// Integer matrix products on AVX-512 VNNI: activations int8, weights read as unsigned bytes.
//
//   y[m][n] = narrow(((float(acc) * x.scale[m]) * weight_scale[n]) + bias[n])
//   acc     = sum over k of (u[n][k] - kOffset) * q[m][k]              (exact)
//
// vpdpbusd multiplies 64 unsigned by 64 signed bytes and adds them up in 16 int32 lanes, without
// saturation. The weight is the unsigned operand, so it carries an offset (128 for INT8, 1 for
// ternary codes 0, 1, 2) which costs one subtraction of offset * x.sum[m] per output. Intermediate
// sums may wrap modulo 2^32; the true one fits, so the result is exact.
//
// How a kernel uses this header (its file must be named avx512vnni.cpp):
//
//   1. Describe the weight by a type. `PanelWeight<offset>` takes unsigned bytes in memory:
//      rows of `stride` bytes, a multiple of 64, 64-byte aligned; row `first_n` at `data`. Bytes
//      beyond k may hold anything. Decode a block of block_columns(k) rows into a Scratch, then
//        integer_linear(x, PanelWeight<128>{panel, stride, n}, k, {weight_scale}, out,
//                       {tile.m_begin, tile.m_end, n, n + rows});
//      for each block in turn: the panel stays in L2 while all activation rows pass.
//      `PackedInt8Weight` reads packed INT8 rows directly. Your own type (for instance one
//      that decodes in registers, best when there are few activation rows) needs
//        static constexpr int32_t kOffset;
//        static constexpr int64_t kMaxTileRows = 6;
//        int64_t whole_k;                              // multiple of 64: load may be used below it
//        Row row(int64_t n) const;                     // a pointer to row n, of any kind
//        static __m512i load(Row row, int64_t k);      // bytes k .. k + 63 of the row, unsigned
//        __m512i load_tail(Row row, int64_t k) const;  // the same at whole_k, if k goes beyond it
//        row_length, prefetch, touch                   // optional: see gemm_few_rows.h
//      With `using ManyRows = RowVectors;` and a kManyRows it takes part in gemm_many_rows.h.
//   2. Call integer_linear(x, weight, k, scaling, out, tile). x.q is zero from k to a multiple of
//      64 (QuantizedInput does that). `Scaling` is {weight_scale}, {weight_scale, true} for one
//      scale per tensor, and can subtract a column term from acc (zero points).
//   For groups along k, or several weights in one output, take accumulate_block (int32 sums of up
//   to 6 rows and kMaxBlockColumns columns) and do your own scaling.
//
// What bounds it, and INT8 on Zen 4 at 2560 x 2560 and 4096 x 4096, quantising and scaling
// included:
// - many rows: the vpdpbusd of the core (two a cycle, one on Zen 4). A step of a tile is 24 of them
//   on 11 loads and nothing else. From 128 rows on 90 to 95% of that peak, at 32 rows 79 to 86%:
//   the rest goes to the sums of the weight (one more row) and to fetching it.
// - one to four rows: reading the weight, in four streams. From memory, the kernel alone, one row
//   takes 240 us at 2560 x 2560 and 600 at 4096 x 4096 (28 GB/s), two and three rows 5 and 15%
//   more.
// - eight rows: the products and the reading, which overlap. The tiles take 245 and 620 us from L2,
//   where the products at their peak take 228 and 584; 338 and 903 from memory, where a loop that
//   only reads takes 225 and 570. What is left: prefetches, which alone bring what is used one
//   block later, arrive at some 20 GB/s; the processor's own prefetchers, which bring more, follow
//   only what is used at once (8 rows on four streams: 0.8 of the speed). A packed weight, one
//   stream of tiles, was no faster than the rows as they lie.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "common/gemm_blocking.h"
#include "common/x86/float_avx512.h"

namespace trine {
namespace {

// Each quarter (128 bits) of the result holds the sums of that quarter of a, b, c, d.
[[maybe_unused]] inline __m512i sum_within_quarters(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

[[maybe_unused]] inline __m128i sum_quarters(__m512i a) {
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// Not __m512i, which has 64-bit lanes: gcc 12 spills sums whose type changes at each instruction.
using Int32x16 = int32_t __attribute__((vector_size(64)));

[[maybe_unused]] inline Int32x16 dot(Int32x16 sum, __m512i w, __m512i q) {
  return (Int32x16)_mm512_dpbusd_epi32((__m512i)sum, w, q);
}

// Sixteen activation rows to a vector, for gemm_many_rows.h. Here the activations are the unsigned
// operand: q + 128.
struct RowVectors {
  static constexpr int64_t kLanes = 16;
  // More would take longer than a vector that they do not fill.
  static constexpr int64_t kLastRows = 8;
  static constexpr int64_t kGroup = 4;
  static constexpr int64_t kGroupBytes = 64;
  static constexpr int kMaxVectors = 3;
  static constexpr int64_t kColumns = 8;  // with three vectors 24 sums on 11 loads
  // The activations of a slice, 192 KiB, stay in L2 beside the weight.
  static constexpr int64_t kSliceK = 4096;
  static constexpr int32_t kOffset = 128;

  static void interleave(const int8_t* q, int64_t stride, int64_t rows, int64_t groups, char* to,
                         int64_t to_stride) {
    const int8_t* row[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) row[i] = q + std::min(i, rows - 1) * stride;
    for (int64_t group = 0; group < groups; group += 4) {
      // Four groups of 16 rows; then quarter i of column j holds group j of rows 4i .. 4i + 3.
      const auto four_rows = [&](int64_t i) {
        const auto load = [&](int64_t r) {
          return _mm_load_si128(reinterpret_cast<const __m128i*>(row[r] + group * kGroup));
        };
        __m512i v = _mm512_castsi128_si512(load(i));
        v = _mm512_inserti32x4(v, load(i + 4), 1);
        v = _mm512_inserti32x4(v, load(i + 8), 2);
        v = _mm512_inserti32x4(v, load(i + 12), 3);
        return _mm512_xor_si512(v, _mm512_set1_epi8(static_cast<char>(0x80)));
      };
      const Quarters columns = transposed(four_rows(0), four_rows(1), four_rows(2), four_rows(3));
      const int64_t count = std::min<int64_t>(4, groups - group);
      for (int64_t j = 0; j < count; ++j, to += to_stride) _mm512_store_si512(to, columns.v[j]);
    }
  }

  // gcc keeps sums in registers only where everything is inlined when it first looks: by force.
  template <int kVectors>
  [[gnu::noinline]] static void accumulate(const int8_t* const (&w)[kColumns], int64_t ahead,
                                           const char* x, int64_t groups, bool first,
                                           int32_t* sums) {
    Int32x16 acc[kVectors][kColumns];
    unrolled<kVectors * kColumns>([&](auto i) __attribute__((always_inline)) {
      acc[i / kColumns][i % kColumns] = Int32x16{};
    });
    const auto step = [&](int64_t group) __attribute__((always_inline)) {
      __m512i q[kVectors];
      unrolled<kVectors>([&](auto i) __attribute__((always_inline)) {
        q[i] = _mm512_load_si512(x + (group * kVectors + i) * 64);
      });
      unrolled<kColumns>([&](auto j) __attribute__((always_inline)) {
        int32_t bytes;
        std::memcpy(&bytes, w[j] + group * kGroup, sizeof(bytes));
        __m512i weight = _mm512_set1_epi32(bytes);
        asm("" : "+v"(weight));  // gcc would load it once for each vector
        unrolled<kVectors>([&](auto i) __attribute__((always_inline)) {
          acc[i][j] = dot(acc[i][j], q[i], weight);
        });
      });
    };
    int64_t group = 0;
    for (; group + 16 <= groups; group += 16) {  // a cache line of each weight row
      unrolled<kColumns>([&](auto j) __attribute__((always_inline)) {
        _mm_prefetch(w[j] + ahead + group * kGroup, _MM_HINT_T1);
      });
      for (int64_t i = 0; i < 16; ++i) step(group + i);
    }
    for (; group < groups; ++group) step(group);

    static_assert(kColumns == 8);
    const __mmask8 added_to = first ? 0 : 0xff;
    unrolled<kVectors>([&](auto i) __attribute__((always_inline)) {
      const auto transposed4 = [&](auto j) __attribute__((always_inline)) {
        return transposed((__m512i)acc[i][j], (__m512i)acc[i][j + 1], (__m512i)acc[i][j + 2],
                          (__m512i)acc[i][j + 3]);
      };
      const Quarters left = transposed4(std::integral_constant<int, 0>{});
      const Quarters right = transposed4(std::integral_constant<int, 4>{});
      unrolled<4>([&](auto r) __attribute__((always_inline)) {
        const auto add = [&](int64_t row, __m256i sum) __attribute__((always_inline)) {
          auto* to = reinterpret_cast<__m256i*>(sums + (16 * i + row) * kManySums);
          _mm256_store_si256(to, _mm256_add_epi32(_mm256_maskz_load_epi32(added_to, to), sum));
        };
        // Two rows of eight columns each: the first two quarters of both, the last two.
        const __m512i rows0 = _mm512_permutex2var_epi64(
            left.v[r], _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), right.v[r]);
        const __m512i rows2 = _mm512_permutex2var_epi64(
            left.v[r], _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), right.v[r]);
        add(r, _mm512_castsi512_si256(rows0));
        add(r + 4, _mm512_extracti64x4_epi64(rows0, 1));
        add(r + 8, _mm512_castsi512_si256(rows2));
        add(r + 12, _mm512_extracti64x4_epi64(rows2, 1));
      });
    });
  }

  static void sum_rows(const int8_t* const (&w)[kColumns], int64_t groups, int32_t* sums) {
    const __m512i ones = _mm512_set1_epi8(1);
    Int32x16 acc[kColumns] = {};
    int64_t group = 0;
    for (; group + 16 <= groups; group += 16)
      unrolled<kColumns>([&](auto i) __attribute__((always_inline)) {
        acc[i] = dot(acc[i], ones, _mm512_loadu_si512(w[i] + group * kGroup));
      });
    if (group < groups)
      unrolled<kColumns>([&](auto i) __attribute__((always_inline)) {
        const __mmask16 mask = first_lanes(groups - group);
        acc[i] = dot(acc[i], ones, _mm512_maskz_loadu_epi32(mask, w[i] + group * kGroup));
      });
    unrolled<kColumns / 4>([&](auto i) __attribute__((always_inline)) {
      const __m128i sum =
          sum_quarters(sum_within_quarters((__m512i)acc[4 * i], (__m512i)acc[4 * i + 1],
                                           (__m512i)acc[4 * i + 2], (__m512i)acc[4 * i + 3]));
      auto* to = reinterpret_cast<__m128i*>(sums + 4 * i);
      _mm_store_si128(to, _mm_add_epi32(_mm_load_si128(to), sum));
    });
  }

 private:
  struct Quarters {
    __m512i v[4];
  };

  // Each quarter by itself: word j of its four words in a, b, c, d becomes v[j].
  [[gnu::always_inline]] static Quarters transposed(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
    return {{_mm512_unpacklo_epi64(ab_low, cd_low), _mm512_unpackhi_epi64(ab_low, cd_low),
             _mm512_unpacklo_epi64(ab_high, cd_high), _mm512_unpackhi_epi64(ab_high, cd_high)}};
  }
};

template <int32_t offset>
struct PanelWeight {
  static constexpr int32_t kOffset = offset;
  static constexpr int64_t kMaxTileRows = 6;

  using Row = const uint8_t*;

  Row data;
  int64_t stride;
  int64_t first_n;
  int64_t whole_k = stride;

  Row row(int64_t n) const { return data + (n - first_n) * stride; }
  static __m512i load(const uint8_t* row, int64_t k) { return _mm512_load_si512(row + k); }
  static __m512i load_tail(const uint8_t* row, int64_t k) { return load(row, k); }
};

// Packed INT8 rows, int8 [n][stride], made unsigned by flipping the sign bit (w + 128). A packed
// row is whole 16-byte chunks, so the last load of a row is masked: it may end at the end of the
// memory. Four rows that follow one another are too short for the processor's own prefetchers, so
// that a block is fetched, into L2, while the one before it is used (8 rows of 2560 x 2560 from
// memory: 1.5 times as fast as with the lines two tiles ahead). Up to four activation rows read
// four long streams instead.
struct PackedInt8Weight {
  static constexpr int32_t kOffset = 128;
  static constexpr int64_t kMaxTileRows = 8;
  static constexpr int64_t kStreamedRows = 4;
  using ManyRows = RowVectors;
  static constexpr int64_t kManyRows = 13;
  using Row = const int8_t*;

  Row data;
  int64_t stride;
  int64_t whole_k = stride / 64 * 64;
  __mmask64 tail = (__mmask64{1} << (stride % 64)) - 1;

  Row row(int64_t n) const { return data + n * stride; }
  static __m512i load(Row row, int64_t k) { return flip(_mm512_loadu_si512(row + k)); }
  __m512i load_tail(Row row, int64_t k) const {
    return flip(_mm512_maskz_loadu_epi8(tail, row + k));
  }
  int64_t row_length() const { return stride; }
  // Inlined by force: gcc 12 drops a call whose only effect is a prefetch.
  [[gnu::always_inline]] void prefetch(int64_t at, int64_t lines) const {
    for (; lines > 0; --lines, at += 64) _mm_prefetch(data + at, _MM_HINT_T1);
  }
  [[gnu::always_inline]] void touch(int64_t at, int64_t count) const {
    touch_pages(data + at, count);
  }

 private:
  static __m512i flip(__m512i w) {
    return _mm512_xor_si512(w, _mm512_set1_epi8(static_cast<char>(0x80)));
  }
};

// The sums of kRows activation rows and kColumns weight rows.
template <int kRows, int kColumns, class Weight>
void accumulate_columns(const Weight& weight, const TileRows& x, int64_t n, int64_t last_n,
                        const Slice& k, int32_t* sums) {
  typename Weight::Row rows[kColumns];  // beyond the last it repeats; those sums are never read
  unrolled<kColumns>([&](auto j) __attribute__((always_inline)) {
    rows[j] = weight.row(std::min(n + j, last_n));
  });
  Int32x16 acc[kRows][kColumns];
  unrolled<kRows>([&](auto i) __attribute__((always_inline)) {
    unrolled<kColumns>([&](auto j) __attribute__((always_inline)) { acc[i][j] = Int32x16{}; });
  });
  const auto step = [&](int64_t at, const auto& load) __attribute__((always_inline)) {
    __m512i w[kColumns];
    unrolled<kColumns>([&](auto j) __attribute__((always_inline)) { w[j] = load(rows[j], at); });
    unrolled<kRows>([&](auto i) __attribute__((always_inline)) {
      __m512i q = _mm512_load_si512(x.q + i * x.stride + at);
      asm("" : "+v"(q));  // gcc would load it once for each column
      unrolled<kColumns>(
          [&](auto j) __attribute__((always_inline)) { acc[i][j] = dot(acc[i][j], w[j], q); });
    });
  };

  const int64_t whole_end = std::min(k.end, weight.whole_k);
  int64_t at = k.begin;
  for (; at < whole_end; at += 64) {
    if constexpr (FetchedAhead<Weight>) fetch_step(weight, x, at - k.begin);
    step(at, [](const auto& row, int64_t from) { return Weight::load(row, from); });
  }
  if (at < k.end)
    step(at, [&](const auto& row, int64_t from) { return weight.load_tail(row, from); });

  static_assert(kColumns == 2 || kColumns == 4);
  constexpr int kRowsAtOnce = 4 / kColumns;
  unrolled<(kRows + kRowsAtOnce - 1) / kRowsAtOnce>([&](auto part) __attribute__((always_inline)) {
    constexpr int i = part * kRowsAtOnce, third = 2 % kColumns;
    constexpr int next = std::min(i + kRowsAtOnce, kRows) - 1;
    const __m128i sum =
        sum_quarters(sum_within_quarters((__m512i)acc[i][0], (__m512i)acc[i][1],
                                         (__m512i)acc[next][third], (__m512i)acc[next][third + 1]));
    int32_t* to = sums + i * kMaxBlockColumns;
    if constexpr (kColumns == 4) {
      auto* four = reinterpret_cast<__m128i*>(to);
      _mm_store_si128(four, _mm_add_epi32(_mm_load_si128(four), sum));
    } else {
      auto* two = reinterpret_cast<__m128i*>(to);
      auto* below = reinterpret_cast<__m128i*>(to + kMaxBlockColumns);
      _mm_storel_epi64(two, _mm_add_epi32(_mm_loadl_epi64(two), sum));
      if constexpr (next > i)
        _mm_storel_epi64(below,
                         _mm_add_epi32(_mm_loadl_epi64(below), _mm_unpackhi_epi64(sum, sum)));
    }
  });
}

template <int kRows, class Weight>
void accumulate_tile(const Weight& weight, const TileRows& x, int64_t n, int64_t last_n,
                     const Slice& k, int32_t* sums) {
  // 24 sums and what they are made of are what 32 registers hold.
  if constexpr (kRows <= 6) {
    accumulate_columns<kRows, 4>(weight, x, n, last_n, k, sums);
  } else {
    for (int part = 0; part < 2; ++part)
      accumulate_columns<kRows, 2>(weight, part_of(x, part, 2, k), n + 2 * part, last_n, k,
                                   sums + 2 * part);
  }
}

template <class T>
void store_values(const Finish& f, const float* values, T* y, int64_t y_stride) {
  for (int64_t i = 0; i < f.rows; ++i, values += f.columns)
    for (int64_t n = 0; n < f.columns; n += 16)
      store_floats(load_floats(values + n, f.columns - n), y + i * y_stride + n, f.columns - n);
}

// Adding -0 changes no float, as no bias must.
template <class Weight, class T>
void finish_sums(const Weight&, const Finish& f, T* y, int64_t y_stride) {
  const auto finish = [&](int64_t n, int64_t lanes) __attribute__((always_inline)) {
    const __m512i column_minus =
        f.column_minus == nullptr
            ? _mm512_setzero_si512()
            : _mm512_maskz_loadu_epi32(first_lanes(lanes), f.column_minus + n);
    const __m512 weight_scale =
        f.per_tensor ? _mm512_set1_ps(*f.weight_scale) : load_floats(f.weight_scale + n, lanes);
    const __m512 bias = f.bias == nullptr ? _mm512_set1_ps(-0.0f) : load_floats(f.bias + n, lanes);
    for (int64_t i = 0; i < f.rows; ++i) {
      const __m512i minus = _mm512_set1_epi32(wrapping_product(f.offset, f.x_sum[i]));
      const __m512i sum = _mm512_load_si512(f.sums + i * f.sums_stride + n);
      const __m512i acc = _mm512_sub_epi32(_mm512_sub_epi32(sum, minus), column_minus);
      const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(acc), _mm512_set1_ps(f.x_scale[i]));
      const __m512 value = _mm512_add_ps(_mm512_mul_ps(scaled, weight_scale), bias);
      // Its second operand where one is NaN.
      store_floats(_mm512_max_ps(_mm512_set1_ps(f.least), value), y + i * y_stride + n, lanes);
    }
  };
  int64_t n = 0;
  for (; n + 16 <= f.columns; n += 16) finish(n, 16);
  if (n < f.columns) finish(n, f.columns - n);
}

}  // namespace
}  // namespace trine
