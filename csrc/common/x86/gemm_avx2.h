// Integer matrix products on AVX2: activations and weights int8.
//
//   y[m][n] = narrow(((float(acc) * x.scale[m]) * weight_scale[n]) + bias[n])
//   acc     = sum over k of w[n][k] * q[m][k]              (exact)
//
// vpmaddubsw multiplies 32 unsigned by 32 signed bytes and adds pairs into int16, which saturates:
// |q| times w with q's sign cannot get there. The sign is given by inverting the bits of w, a free
// choice of port where vpsignb competes with the multiplications, and ~w = -w - 1:
//
//   sum of w * q = sum of |q| * (q < 0 ? ~w : w) + sum of |q| where q < 0
//
// The last term belongs to a row of q: its sums begin with it. A pair lies in [-2 * 128 * 128,
// 2 * 128 * 127], which int16 holds; it is widened to int32 at once.
//
// How a kernel uses this header (its file must be named avx2.cpp):
//
//   1. Describe the weight by a type. `PackedInt8Weight` reads packed INT8 rows. Your own type
//      needs
//        static constexpr int32_t kOffset = 0;
//        static constexpr int64_t kMaxTileRows = kTileRows;
//        static constexpr auto kFirstSum = sum_below_zero;
//        int64_t whole_k;                              // multiple of 32: load may be used below it
//        Row row(int64_t n) const;                     // a pointer to row n, of any kind
//        static __m256i load(Row row, int64_t k);      // bytes k .. k + 31 of the row
//        __m256i load_tail(Row row, int64_t k) const;  // the same at whole_k, if k goes beyond it
//        row_length, prefetch, touch                   // optional: see gemm_few_rows.h
//      With `using ManyRows = RowVectors;` and a kManyRows it takes part in gemm_many_rows.h.
//   2. Call integer_linear(x, weight, k, scaling, out, tile). x.q is zero from k to a multiple of
//      64 (QuantizedInput does that). `Scaling` is {weight_scale}, {weight_scale, true} for one
//      scale per tensor, and can subtract a column term from acc (zero points).
//   For groups along k, or several weights in one output, take accumulate_block (int32 sums of up
//   to kMaxTileRows rows and kMaxBlockColumns columns) and do your own scaling.
//
// What bounds it: the vector instructions, four per 32 products (invert, multiply, widen, add), of
// which two need one of Zen 4's two multipliers: 236 GOP/s. In registers alone the four reach 227
// (with vpsignb 140; two pairs of vpmaddwd and add, 187). Measured with everything around it, from
// the caches: 175 to 186 with 16 rows and more, 165 with 8, 150 with 4. fbgemm, which saturates,
// needs three: 180 to 195 there (FBGEMM_ENABLE_INSTRUCTIONS=AVX2 python -m benchmarks.run cpu
// --op int8_linear --isa avx2). With one row, the reading of the weight.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "common/gemm_blocking.h"
#include "common/x86/gemm_finish_avx2.h"

namespace trine {
namespace {

// As many rows of four sums as the 16 registers hold beside the operands: four of the weight, |q|
// and the signs of q.
inline constexpr int64_t kTileRows = 2;

// Unsigned: sums of a damaged weight may wrap. Not __m256i, which has 64-bit lanes: gcc 12 spills
// sums whose type changes at each instruction.
using Uint32x8 = uint32_t __attribute__((vector_size(32)));

// The bytes of q as vpmaddubsw takes them: |q|, and ones where a byte of the weight is to be
// inverted. Where q is 0 they may be either.
struct Signed {
  __m256i magnitude, negative;
};

[[maybe_unused]] inline Signed signs_apart(__m256i q) {
  return {_mm256_abs_epi8(q), _mm256_cmpgt_epi8(_mm256_set1_epi16(1), q)};
}

// sum + w * q - (what q has below zero), over 32 columns.
[[gnu::always_inline]] inline Uint32x8 multiply_add(Uint32x8 sum, __m256i w, const Signed& q) {
  const __m256i pairs = _mm256_maddubs_epi16(q.magnitude, _mm256_xor_si256(w, q.negative));
  return sum + (Uint32x8)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// What a row of sums begins with: the |q| of all q below zero.
[[maybe_unused]] inline int32_t sum_below_zero(const int8_t* q, int64_t k) {
  __m256i sum = _mm256_setzero_si256();  // of 64-bit lanes
  for (int64_t at = 0; at < k; at += 32) {
    const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(q + at));
    const __m256i below = _mm256_min_epi8(bytes, _mm256_setzero_si256());
    sum = _mm256_add_epi64(sum, _mm256_sad_epu8(_mm256_abs_epi8(below), _mm256_setzero_si256()));
  }
  return _mm_cvtsi128_si32(sum_lanes(sum, sum, sum, sum));
}

struct Halves {
  __m256i v[4];
};

// Each half by itself: word j of its four words in a, b, c, d becomes v[j].
[[maybe_unused]] inline Halves transposed(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i ab_low = _mm256_unpacklo_epi32(a, b), ab_high = _mm256_unpackhi_epi32(a, b);
  const __m256i cd_low = _mm256_unpacklo_epi32(c, d), cd_high = _mm256_unpackhi_epi32(c, d);
  return {{_mm256_unpacklo_epi64(ab_low, cd_low), _mm256_unpackhi_epi64(ab_low, cd_low),
           _mm256_unpacklo_epi64(ab_high, cd_high), _mm256_unpackhi_epi64(ab_high, cd_high)}};
}

// write(group, four columns of each of eight rows, a row in each 32-bit lane) for `groups` groups
// of columns. Rows from `rows` on repeat the last.
template <class Write>
[[gnu::always_inline]] inline void transpose_rows(const int8_t* q, int64_t stride, int64_t rows,
                                                  int64_t groups, const Write& write) {
  const int8_t* row[8];
  for (int64_t i = 0; i < 8; ++i) row[i] = q + std::min(i, rows - 1) * stride;
  for (int64_t group = 0; group < groups; group += 4) {
    // Four groups of rows i and i + 4; then half h of column j holds group j of rows 4h .. 4h + 3.
    const auto two_rows = [&](int64_t i) {
      const auto load = [&](int64_t r) {
        return _mm_load_si128(reinterpret_cast<const __m128i*>(row[r] + group * 4));
      };
      return _mm256_setr_m128i(load(i), load(i + 4));
    };
    const Halves columns = transposed(two_rows(0), two_rows(1), two_rows(2), two_rows(3));
    const int64_t count = std::min<int64_t>(4, groups - group);
    for (int64_t j = 0; j < count; ++j) write(group + j, columns.v[j]);
  }
}

// Eight activation rows to a vector, for gemm_many_rows.h: |q| and signs of four k of each.
struct RowVectors {
  static constexpr int64_t kLanes = 8;
  // More would take longer than a vector that they do not fill.
  static constexpr int64_t kLastRows = 4;
  static constexpr int64_t kGroup = 4;
  static constexpr int64_t kGroupBytes = 64;
  static constexpr int kMaxVectors = 2;
  static constexpr int64_t kColumns = 4;
  // The activations of a slice, 128 KiB, stay in L2 beside the weight: two loads for sixteen
  // instructions. Shorter slices, for L1, read the weight in shorter pieces, which is slower.
  static constexpr int64_t kSliceK = 4096;
  static constexpr int32_t kOffset = 0;
  static constexpr auto kFirstSum = sum_below_zero;

  static void interleave(const int8_t* q, int64_t stride, int64_t rows, int64_t groups, char* to,
                         int64_t to_stride) {
    transpose_rows(q, stride, rows, groups, [&](int64_t group, __m256i columns) {
      const Signed apart = signs_apart(columns);
      auto* at = reinterpret_cast<__m256i*>(to + group * to_stride);
      _mm256_store_si256(at, apart.magnitude);
      _mm256_store_si256(at + 1, apart.negative);
    });
  }

  // gcc keeps sums in registers only where everything is inlined when it first looks: by force.
  template <int kVectors>
  [[gnu::noinline]] static void accumulate(const int8_t* const (&w)[kColumns], int64_t ahead,
                                           const char* x, int64_t groups, bool first,
                                           int32_t* sums) {
    Uint32x8 acc[kVectors][kColumns];
    unrolled<kVectors>([&](auto i) __attribute__((always_inline)) {
      acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = Uint32x8{};
    });
    const auto step = [&](int64_t group) __attribute__((always_inline)) {
      Signed q[kVectors];
      unrolled<kVectors>([&](auto i) __attribute__((always_inline)) {
        const auto* at = reinterpret_cast<const __m256i*>(x + (group * kVectors + i) * kGroupBytes);
        q[i] = {_mm256_load_si256(at), _mm256_load_si256(at + 1)};
      });
      unrolled<kColumns>([&](auto j) __attribute__((always_inline)) {
        int32_t bytes;
        std::memcpy(&bytes, w[j] + group * kGroup, sizeof(bytes));
        __m256i weight = _mm256_set1_epi32(bytes);
        asm("" : "+x"(weight));  // gcc would load it once for each vector
        unrolled<kVectors>([&](auto i) __attribute__((always_inline)) {
          acc[i][j] = multiply_add(acc[i][j], weight, q[i]);
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
    const __m128i added_to = _mm_set1_epi32(first ? 0 : -1);
    unrolled<kVectors>([&](auto i) {
      const Halves rows = transposed((__m256i)acc[i][0], (__m256i)acc[i][1], (__m256i)acc[i][2],
                                     (__m256i)acc[i][3]);
      unrolled<4>([&](auto r) {
        const auto add = [&](int64_t row, __m128i sum) {
          auto* to = reinterpret_cast<__m128i*>(sums + (kLanes * i + row) * kManySums);
          const __m128i before = _mm_and_si128(_mm_load_si128(to), added_to);
          _mm_store_si128(to, _mm_add_epi32(before, sum));
        };
        add(r, _mm256_castsi256_si128(rows.v[r]));
        add(r + 4, _mm256_extracti128_si256(rows.v[r], 1));
      });
    });
  }
};

// Packed INT8 rows, int8 [n][stride], as they lie. A packed row is whole 16-byte chunks, so the
// last load of a row may be a half: the row may end at the end of the memory. The next block is
// prefetched, and one activation row reads four streams, for the reasons given in
// gemm_avx512vnni.h.
struct PackedInt8Weight {
  static constexpr int32_t kOffset = 0;
  static constexpr int64_t kMaxTileRows = kTileRows;
  static constexpr auto kFirstSum = sum_below_zero;
  using ManyRows = RowVectors;
  static constexpr int64_t kManyRows = 8;
  using Row = const int8_t*;

  Row data;
  int64_t stride;
  int64_t whole_k = stride / 32 * 32;

  Row row(int64_t n) const { return data + n * stride; }
  static __m256i load(Row row, int64_t k) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + k));
  }
  __m256i load_tail(Row row, int64_t k) const {
    return k >= stride
               ? _mm256_setzero_si256()
               : _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + k)));
  }
  int64_t row_length() const { return stride; }
  // Inlined by force: gcc 12 drops a call whose only effect is a prefetch.
  [[gnu::always_inline]] void prefetch(int64_t at, int64_t lines) const {
    for (; lines > 0; --lines, at += 64) _mm_prefetch(data + at, _MM_HINT_T1);
  }
  [[gnu::always_inline]] void touch(int64_t at, int64_t count) const {
    touch_pages(data + at, count);
  }
};

template <int kRows, class Weight>
void accumulate_tile(const Weight& weight, const TileRows& x, int64_t n, int64_t last_n,
                     const Slice& k, int32_t* sums) {
  // Columns beyond the last repeat it; their sums are never read.
  const auto row0 = weight.row(n);
  const auto row1 = weight.row(std::min(n + 1, last_n));
  const auto row2 = weight.row(std::min(n + 2, last_n));
  const auto row3 = weight.row(std::min(n + 3, last_n));

  Uint32x8 acc[kRows][kTileColumns];
  unrolled<kRows>([&](auto i) { acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = Uint32x8{}; });
  const auto step = [&](int64_t at, __m256i w0, __m256i w1, __m256i w2, __m256i w3) {
    unrolled<kRows>([&](auto i) {
      const __m256i q =
          _mm256_load_si256(reinterpret_cast<const __m256i*>(x.q + i * x.stride + at));
      const Signed apart = signs_apart(q);
      acc[i][0] = multiply_add(acc[i][0], w0, apart);
      acc[i][1] = multiply_add(acc[i][1], w1, apart);
      acc[i][2] = multiply_add(acc[i][2], w2, apart);
      acc[i][3] = multiply_add(acc[i][3], w3, apart);
    });
  };

  const int64_t whole_end = std::min(k.end, weight.whole_k);
  int64_t at = k.begin;
  for (; at < whole_end; at += 32) {
    if constexpr (FetchedAhead<Weight>)
      if (at % 64 == 0) fetch_step(weight, x, at - k.begin);
    step(at, weight.load(row0, at), weight.load(row1, at), weight.load(row2, at),
         weight.load(row3, at));
  }
  if (at < k.end)
    step(at, weight.load_tail(row0, at), weight.load_tail(row1, at), weight.load_tail(row2, at),
         weight.load_tail(row3, at));

  unrolled<kRows>([&](auto i) {
    auto* row = reinterpret_cast<__m128i*>(sums + i * kMaxBlockColumns);
    const __m128i sum =
        sum_lanes((__m256i)acc[i][0], (__m256i)acc[i][1], (__m256i)acc[i][2], (__m256i)acc[i][3]);
    _mm_store_si128(row, _mm_add_epi32(_mm_load_si128(row), sum));
  });
}

}  // namespace
}  // namespace trine
