// Few rows of x with int8 values on AVX2: only stored values are multiplied. The weight is not
// spread out to the columns of x; the columns that a weight row stores are picked from x instead:
//
//   tables   64 columns of x, 16 in each 128-bit lane of two registers: vpshufb picks inside lanes
//   places   where the 32 values of a weight row lie in these lanes
//   values   these values
//   acc += vpmaddwd(vpmaddubsw(|values|, picked with the signs of values), 1)
//
// A quantised x is never -128, so its sign can be turned; a pair of products lies in
// [-2 * 128 * 127, 2 * 128 * 127], which int16 holds.
//
// What bounds it: the vector instructions. 64 columns of a weight row take seven to make places and
// |values| from the packed row, and seven more for each row of x, where dense columns take eight
// for each row of x. Measured on Zen 3 at 2560 x 2560, beside the dense product: from the caches
// 0.6 to 0.9 times as fast with one to eight rows; from memory, where the weight's
// 5/8 of the bytes count, 1.15 to 1.35 times with one to three rows, 0.85 to 1 with four to eight.
#pragma once

#include "common/changed_rows.h"
#include "common/x86/gemm_avx2.h"
#include "sparse24_linear/int8_values.h"

namespace trine {
namespace {

struct Picks {
  __m256i places, values;
};

// From 64 bits of indices in each half, and 32 values.
[[gnu::always_inline]] inline Picks make_picks(__m256i indices, __m256i values) {
  // Byte g of a half holds the nibble of group g in its low four bits.
  const __m256i nibbles = _mm256_unpacklo_epi8(indices, _mm256_srli_epi16(indices, 4));
  const __m256i group_of_value =
      _mm256_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11,
                       12, 12, 13, 13, 14, 14, 15, 15);
  // Of the first value of a group the low two bits, of the second the high two, where they are.
  const __m256i bits =
      _mm256_and_si256(_mm256_shuffle_epi8(nibbles, group_of_value), _mm256_set1_epi16(0x0c03));
  const __m256i position_of_bits =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0));
  const __m256i group = _mm256_set1_epi64x(0x0c0c080804040000);
  return {_mm256_or_si256(_mm256_shuffle_epi8(position_of_bits, bits), group), values};
}

// How far ahead each of four streams is fetched, where one row of x passes: eight sequences, with
// the indices, are more than the processor's prefetchers follow. Measured on Zen 3: 1.1 times as
// fast from memory, 128 bytes to 4 KiB alike.
constexpr int64_t kStreamAheadBytes = 1024;

struct PackedPicks : FetchedSparse {
  static constexpr int32_t kOffset = 0;
  static constexpr int64_t kMaxTileRows = 8;
  static constexpr bool kPicks = true;

  int64_t whole_k = weight.chunks * kSparse24Columns / 64 * 64;

  SparseRow row(int64_t n) const { return sparse_row(weight, n); }

  [[gnu::always_inline]] static Picks load(const SparseRow& row, int64_t k) {
    int64_t indices;
    std::memcpy(&indices, row.indices + k / 8, sizeof indices);
    return make_picks(_mm256_set1_epi64x(indices),
                      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row.values + k / 2)));
  }
  // An odd number of chunks ends with half of 64 columns.
  [[gnu::always_inline]] static Picks load_tail(const SparseRow& row, int64_t k) {
    uint32_t indices;
    std::memcpy(&indices, row.indices + k / 8, sizeof indices);
    return make_picks(_mm256_set1_epi64x(indices),
                      _mm256_zextsi128_si256(
                          _mm_loadu_si128(reinterpret_cast<const __m128i*>(row.values + k / 2))));
  }
};

// The sums of kRows activation rows and kColumns weight rows. Flattened: gcc must see all of it at
// once to keep the sums in registers.
template <int kRows, int kColumns, class Weight>
[[gnu::flatten]] void accumulate_picks(const Weight& weight, const TileRows& x, int64_t n,
                                       int64_t last_n, const Slice& k, int32_t* sums) {
  SparseRow rows[kColumns];  // beyond the last it repeats; those sums are never read
  unrolled<kColumns>([&](auto j) { rows[j] = weight.row(std::min(n + j, last_n)); });
  Uint32x8 acc[kRows][kColumns];
  unrolled<kRows>([&](auto i) { unrolled<kColumns>([&](auto j) { acc[i][j] = Uint32x8{}; }); });
  const auto step = [&](int64_t at, const auto& load) __attribute__((always_inline)) {
    unrolled<kColumns>([&](auto j) __attribute__((always_inline)) {
      const Picks picks = load(rows[j], at);
      const __m256i magnitudes = _mm256_abs_epi8(picks.values);
      unrolled<kRows>([&](auto i) __attribute__((always_inline)) {
        const auto* tables = reinterpret_cast<const __m256i*>(x.q + i * x.stride + at);
        const __m256i picked = _mm256_blend_epi32(
            _mm256_shuffle_epi8(_mm256_load_si256(tables), picks.places),
            _mm256_shuffle_epi8(_mm256_load_si256(tables + 1), picks.places), 0xcc);
        const __m256i pairs =
            _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(picked, picks.values));
        acc[i][j] += (Uint32x8)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
      });
    });
  };

  const int64_t whole_end = std::min(k.end, weight.whole_k);
  int64_t at = k.begin;
  for (; at < whole_end; at += 64) {
    if constexpr (FetchedAhead<Weight>)
      fetch_step(weight, x, at - k.begin);
    else
      unrolled<kColumns>([&](auto j) __attribute__((always_inline)) {
        if (at % 128 == 0) _mm_prefetch(rows[j].values + at / 2 + kStreamAheadBytes, _MM_HINT_T0);
        if (at % 512 == 0)
          _mm_prefetch(rows[j].indices + at / 8 + kStreamAheadBytes / 4, _MM_HINT_T0);
      });
    step(at, [](const SparseRow& row, int64_t from)
                 __attribute__((always_inline)) { return Weight::load(row, from); });
  }
  if (at < k.end)
    step(at, [](const SparseRow& row, int64_t from)
                 __attribute__((always_inline)) { return Weight::load_tail(row, from); });

  unrolled<kRows>([&](auto i) {
    auto* to = reinterpret_cast<__m128i*>(sums + i * kMaxBlockColumns);
    if constexpr (kColumns == 4) {
      const __m128i sum =
          sum_lanes((__m256i)acc[i][0], (__m256i)acc[i][1], (__m256i)acc[i][2], (__m256i)acc[i][3]);
      _mm_store_si128(to, _mm_add_epi32(_mm_load_si128(to), sum));
    } else {
      const __m256i first = (__m256i)acc[i][0], last = (__m256i)acc[i][kColumns - 1];
      const __m128i sum = sum_lanes(first, last, first, last);
      if constexpr (kColumns == 2)
        _mm_storel_epi64(to, _mm_add_epi32(_mm_loadl_epi64(to), sum));
      else
        sums[i * kMaxBlockColumns] += _mm_cvtsi128_si32(sum);
    }
  });
}

template <int kRows, class Weight>
  requires requires { Weight::kPicks; }
void accumulate_tile(const Weight& weight, const TileRows& x, int64_t n, int64_t last_n,
                     const Slice& k, int32_t* sums) {
  constexpr int kColumns = kRows == 1 ? 4 : kRows <= 4 ? 2 : 1;  // 16 registers hold no more
  constexpr int kParts = kTileColumns / kColumns;
  for (int part = 0; part < kParts; ++part) {
    const int64_t j = part * kColumns;
    accumulate_picks<kRows, kColumns>(weight, part_of(x, part, kParts, k), n + j, last_n, k,
                                      sums + j);
  }
}

// All of `tile`.
[[maybe_unused]] inline void linear_by_picks(const QuantizedRows& x,
                                             const Sparse24Int8Weight& weight,
                                             const LinearOutput& out, const Tile& tile) {
  const auto to_tables = [](const int8_t* q, int8_t* tables) {
    const auto* from = reinterpret_cast<const __m256i*>(q);
    const __m256i low = _mm256_load_si256(from), high = _mm256_load_si256(from + 1);
    auto* to = reinterpret_cast<__m256i*>(tables);
    _mm256_store_si256(to, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_store_si256(to + 1, _mm256_permute2x128_si256(low, high, 0x31));
  };
  with_changed_rows(x, out, tile, to_tables,
                    [&](const QuantizedRows& rows, const LinearOutput& y, const Tile& part) {
                      integer_linear(rows, PackedPicks{{weight}}, weight.chunks * kSparse24Columns,
                                     {weight.scale}, y, part);
                    });
}

}  // namespace
}  // namespace trine
