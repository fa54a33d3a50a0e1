// Many rows of x with int8 values on AVX2: rows of x in the lanes, and only stored values are
// multiplied. A group of four columns of a weight row is two values in two of the columns, one of
// six pairs of them. All six pairs of x, widened to int16, are laid out once for a slice of k:
//
//   panel[group][pair][vector]  eight rows: (x in the first column, x in the second) of each
//   acc[vector] += vpmaddwd(panel[group][the pair of the weight row], its two values)
//
// so that two instructions stand for eight rows and four columns, where dense bytes take four. The
// products are sums in int32 at once, and every sign is as it is.
//
//   for a block of weight rows (they stay in L2)
//     for up to kMaxVectors vectors of rows of x
//       for a slice of k: lay out its pairs (they stay in L1)
//         for a weight row: accumulate         -> int32 sums
//       finish                                 -> y
//
// What bounds it: vpmaddwd and the addition, which Zen 3 is measured to start 1.6 times a cycle;
// the four of a group take 1.2 times as long, and 1.4 times with all around them. Beside the dense
// product that is 1.2 times as fast with 32 rows and more from the caches, 0.9 to 1 with 16.
#pragma once

#include "common/x86/gemm_avx2.h"
#include "common/x86/transpose.h"
#include "sparse24_linear/int8_values.h"

namespace trine {
namespace {

inline constexpr int64_t kLaneRows = 8;
// 32 rows: a value is broadcast for four products, and four sums hide their latency.
inline constexpr int kMaxLaneVectors = 4;
inline constexpr int64_t kPairs = 6;  // of the columns of a group

// Which pair an index nibble names, in the order of `lay_out_pairs`. One that is not ascending
// names some pair.
[[maybe_unused]] inline __m128i pair_of_nibble() {
  return _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 3, 0, 0, 2, 4, 5, 0);
}

// A slice is so many groups that its panel takes 24 KiB of L1, whole chunks.
constexpr int64_t lane_slice_groups(int vectors) { return 128 / vectors / 8 * 8; }

// The pairs of the first `groups` groups of `rows` rows. Lanes beyond repeat the last row.
template <int kVectors>
void lay_out_pairs(const int8_t* q, int64_t stride, int64_t rows, int64_t groups, __m256i* panel) {
  const auto pair_of = [](__m256i columns, int first, int second) __attribute__((always_inline)) {
    // Each byte to the high half of an int16, which is then shifted down with its sign.
    const int32_t to_high = 0x80 | first << 8 | 0x80 << 16 | second << 24;
    const __m256i dword = _mm256_setr_epi32(0, 0x04000400, 0x08000800, 0x0c000c00, 0, 0x04000400,
                                            0x08000800, 0x0c000c00);
    const __m256i from = _mm256_add_epi8(_mm256_set1_epi32(to_high), dword);
    return _mm256_srai_epi16(_mm256_shuffle_epi8(columns, from), 8);
  };
  for (int v = 0; v < kVectors; ++v)
    transpose_rows(q + v * kLaneRows * stride, stride, std::min(rows - v * kLaneRows, kLaneRows),
                   groups, [&](int64_t group, __m256i columns) __attribute__((always_inline)) {
                     __m256i* to = panel + group * kPairs * kVectors + v;
                     to[0 * kVectors] = pair_of(columns, 0, 1);
                     to[1 * kVectors] = pair_of(columns, 0, 2);
                     to[2 * kVectors] = pair_of(columns, 0, 3);
                     to[3 * kVectors] = pair_of(columns, 1, 2);
                     to[4 * kVectors] = pair_of(columns, 1, 3);
                     to[5 * kVectors] = pair_of(columns, 2, 3);
                   });
}

// A slice of a weight row as `accumulate_lanes` reads it: the values of each group as int16, and
// where its pair lies in the group's part of the panel, in eighths of bytes.
struct LaneWeight {
  alignas(32) int32_t values[lane_slice_groups(1)];
  alignas(32) uint8_t places[lane_slice_groups(1)];
};

template <int kVectors>
void widen_slice(const SparseRow& row, int64_t first_group, int64_t groups, LaneWeight& to) {
  constexpr char kEighths = sizeof(__m256i) * kVectors / 8;
  const int8_t* values = row.values + 2 * first_group;
  const uint8_t* indices = row.indices + first_group / 2;
  const __m128i place_of_nibble =
      _mm_shuffle_epi8(_mm_setr_epi8(0, kEighths, 2 * kEighths, 3 * kEighths, 4 * kEighths,
                                     5 * kEighths, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
                       pair_of_nibble());
  for (int64_t group = 0; group < groups; group += 8) {  // a chunk
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 2 * group));
    _mm256_store_si256(reinterpret_cast<__m256i*>(to.values + group), _mm256_cvtepi8_epi16(stored));
    const __m128i bytes = _mm_loadu_si32(indices + group / 2);
    const __m128i nibbles =
        _mm_and_si128(_mm_unpacklo_epi8(bytes, _mm_srli_epi16(bytes, 4)), _mm_set1_epi8(15));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to.places + group),
                     _mm_shuffle_epi8(place_of_nibble, nibbles));
  }
}

// sums[v] += the products of a weight row's `groups` groups, a multiple of eight.
template <int kVectors>
void accumulate_lanes(const LaneWeight& weight, const __m256i* panel, int64_t groups,
                      __m256i* sums) {
  Uint32x8 acc[kVectors];
  unrolled<kVectors>([&](auto v) { acc[v] = (Uint32x8)_mm256_load_si256(sums + v); });
  for (int64_t group = 0; group < groups; group += 8)
    unrolled<8>([&](auto i) __attribute__((always_inline)) {
      const auto* pairs = reinterpret_cast<const __m256i*>(
          reinterpret_cast<const char*>(panel + (group + i) * kPairs * kVectors) +
          int64_t{8} * weight.places[group + i]);
      const __m256i values = _mm256_set1_epi32(weight.values[group + i]);
      unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
        acc[v] += (Uint32x8)_mm256_madd_epi16(_mm256_load_si256(pairs + v), values);
        asm("" : "+x"(acc[v]));  // gcc would add up products first, for which it has no registers
      });
    });
  unrolled<kVectors>([&](auto v) { _mm256_store_si256(sums + v, (__m256i)acc[v]); });
}

// How many weight rows ahead their part of a slice is prefetched: 8 and 48 are slower from memory.
inline constexpr int64_t kLaneRowsAhead = 16;

// Into L1. Inlined by force: gcc 12 drops a call whose only effect is a prefetch.
[[gnu::always_inline]] inline void fetch(const void* from, int64_t bytes) {
  const auto* at = static_cast<const char*>(from);
  for (int64_t byte = 0; byte < bytes; byte += 64) _mm_prefetch(at + byte, _MM_HINT_T0);
  _mm_prefetch(at + bytes - 1, _MM_HINT_T0);  // rows need not begin with a line
}

// sums[n][v] of the weight rows [n_begin, n_end) and the rows of x from m on.
template <int kVectors>
void sum_lane_block(const QuantizedRows& x, int64_t m, int64_t rows,
                    const Sparse24Int8Weight& weight, int64_t n_begin, int64_t n_end,
                    __m256i* panel, __m256i* sums) {
  constexpr int64_t kSliceGroups = lane_slice_groups(kVectors);
  const int64_t groups = weight.chunks * kSparse24Columns / 4;
  std::fill_n(reinterpret_cast<int32_t*>(sums), (n_end - n_begin) * kVectors * kLaneRows, 0);
  LaneWeight widened;
  for (int64_t first = 0; first < groups; first += kSliceGroups) {
    const int64_t count = std::min(kSliceGroups, groups - first);
    lay_out_pairs<kVectors>(x.q + m * x.stride + 4 * first, x.stride, rows, count, panel);
    for (int64_t n = n_begin; n < n_end; ++n) {
      const SparseRow ahead = sparse_row(weight, n + kLaneRowsAhead);
      fetch(ahead.values + 2 * first, 2 * count);
      fetch(ahead.indices + first / 2, count / 2);
      widen_slice<kVectors>(sparse_row(weight, n), first, count, widened);
      accumulate_lanes<kVectors>(widened, panel, count, sums + (n - n_begin) * kVectors);
    }
  }
}

struct LaneSums {  // finish_sums is found by it
  static constexpr int32_t kOffset = 0;
};

// All of `tile`.
[[maybe_unused]] inline void linear_by_lanes(const QuantizedRows& x,
                                             const Sparse24Int8Weight& weight,
                                             const LinearOutput& out, const Tile& tile) {
  constexpr int64_t kMostRows = kMaxLaneVectors * kLaneRows, kTogether = 16;
  const int64_t columns = block_columns(weight.chunks * (kSparse24Values + kSparse24Indices));
  const Scratch panel_storage(lane_slice_groups(1) * kPairs * int64_t(sizeof(__m256i)));
  const Scratch sums_storage(columns * kMostRows * int64_t(sizeof(int32_t)));
  auto* panel = panel_storage.data<__m256i>();
  auto* sums = sums_storage.data<__m256i>();
  alignas(64) int32_t by_row[kMostRows * kTogether];
  for (int64_t n = tile.n_begin; n < tile.n_end; n += columns) {
    const int64_t n_end = std::min(n + columns, tile.n_end);
    for_even_pieces(tile.m_end - tile.m_begin, kMostRows, kLaneRows, [&](int64_t i, int64_t rows) {
      const int64_t m = tile.m_begin + i, vectors = (rows + kLaneRows - 1) / kLaneRows;
      with_count<kMaxLaneVectors>(vectors, [&](auto constant) {
        sum_lane_block<constant>(x, m, rows, weight, n, n_end, panel, sums);
      });
      const auto* values = reinterpret_cast<const float*>(sums);  // moved only
      for (int64_t begin = n; begin < n_end; begin += kTogether) {
        const int64_t end = std::min(begin + kTogether, n_end);
        for (int64_t j = begin; j < end; j += 8)
          for (int64_t v = 0; v < vectors; ++v)
            transpose8x8(values + ((j - n) * vectors + v) * kLaneRows, vectors * kLaneRows,
                         reinterpret_cast<float*>(by_row) + v * kLaneRows * kTogether + j - begin,
                         kTogether);
        finish_rows(x, LaneSums{}, by_row, kTogether, 0, nullptr, {weight.scale}, out,
                    {m, m + rows, begin, end});
      }
    });
  }
}

}  // namespace
}  // namespace trine
