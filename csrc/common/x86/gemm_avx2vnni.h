// Integer matrix products on AVX2-VNNI: activations int8, weights read as unsigned bytes.
//
//   y[m][n] = narrow(((float(acc) * x.scale[m]) * weight_scale[n]) + bias[n])
//   acc     = sum over k of (u[n][k] - kOffset) * q[m][k]              (exact)
//
// As in gemm_avx512vnni.h, on a vpdpbusd half as wide and half as many registers.
//
// How a kernel uses this header: as it says in gemm_avx512vnni.h, but its own kind of weight needs
//   static constexpr int32_t kOffset;
//   static constexpr int64_t kMaxTileRows = kTileRows;
//   int64_t whole_k;                                // multiple of 64: load may be used below it
//   Row row(int64_t n) const;                       // a pointer to row n, of any kind
//   template <int half>
//   static __m256i load(Row row, int64_t k);        // bytes k .. k + 31 of the row, unsigned;
//                                                   // k is 32 * half beyond a multiple of 64
//   template <int half>
//   __m256i load_tail(Row row, int64_t k) const;    // the same from whole_k on
//   row_length, prefetch, touch                     // optional: see gemm_few_rows.h
//
// What bounds it: with many rows, the two vpdpbusd per cycle of the core; a step of a 5 x 2 tile is
// ten of them on seven loads. Measured on Zen 4 in AVX-512's encoding, K = 2560, from the caches:
// 80 to 90% of that peak from three rows on, and never less than 1.1 times as fast as AVX2, at most
// three times. With one to three rows, the reading of the weight.
#pragma once

#include <immintrin.h>

#include "common/gemm_blocking.h"
#include "common/x86/dot_avx2vnni.h"
#include "common/x86/gemm_finish_avx2.h"

namespace trine {
namespace {

// Ten sums of five rows leave six of the 16 registers: two weights, an activation, a constant, and
// two to spare. With six rows gcc 12 spills.
inline constexpr int64_t kTileRows = 5;

template <int32_t offset>
struct PanelWeight {
  static constexpr int32_t kOffset = offset;
  static constexpr int64_t kMaxTileRows = kTileRows;
  using Row = const uint8_t*;

  Row data;
  int64_t stride;
  int64_t first_n;
  int64_t whole_k = stride;

  Row row(int64_t n) const { return data + (n - first_n) * stride; }
  template <int half>
  static __m256i load(Row row, int64_t k) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(row + k));
  }
  template <int half>
  static __m256i load_tail(Row row, int64_t k) {
    return load<half>(row, k);
  }
};

// w + 128 of 32 bytes.
[[maybe_unused]] inline __m256i flip_signs(__m256i w) {
  return _mm256_xor_si256(w, _mm256_set1_epi8(static_cast<char>(0x80)));
}

// Packed INT8 rows, int8 [n][stride], made unsigned by flipping the sign bit (w + 128). A packed
// row is whole 16-byte chunks, so the last load of a row may be a half: the row may end at the end
// of the memory. The next block is prefetched into L2 (see gemm_avx512vnni.h).
struct PackedInt8Weight {
  static constexpr int32_t kOffset = 128;
  static constexpr int64_t kMaxTileRows = kTileRows;
  static constexpr int64_t kStreamedRows = 3;
  using Row = const int8_t*;

  Row data;
  int64_t stride;
  int64_t whole_k = stride / 64 * 64;
  __m256i tail[2] = {first_lanes(stride % 64 / 4), first_lanes(stride % 64 / 4 - 8)};

  Row row(int64_t n) const { return data + n * stride; }
  template <int half>
  static __m256i load(Row row, int64_t k) {
    return flip_signs(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + k)));
  }
  template <int half>
  __m256i load_tail(Row row, int64_t k) const {
    return flip_signs(_mm256_maskload_epi32(reinterpret_cast<const int*>(row + k), tail[half]));
  }
  int64_t row_length() const { return stride; }
  [[gnu::always_inline]] void prefetch(int64_t at, int64_t lines) const {
    for (; lines > 0; --lines, at += 64) _mm_prefetch(data + at, _MM_HINT_T1);
  }
  [[gnu::always_inline]] void touch(int64_t at, int64_t count) const {
    touch_pages(data + at, count);
  }
};

// The sums of kRows activation rows and kColumns weight rows. Flattened: gcc must see all of it at
// once to keep the sums in registers.
template <int kRows, int kColumns, class Weight>
[[gnu::flatten]] void accumulate_columns(const Weight& weight, const TileRows& x, int64_t n,
                                         int64_t last_n, const Slice& k, int32_t* sums) {
  // Where sums are few, each half of 64 columns has its own: a dot product takes 4 or 5 cycles and
  // two can start in each.
  constexpr int kSets = kRows * kColumns <= 6 ? 2 : 1;
  typename Weight::Row rows[kColumns];  // beyond the last it repeats; those sums are never read
  unrolled<kColumns>([&](auto j) { rows[j] = weight.row(std::min(n + j, last_n)); });

  Int32x8 acc[kRows][kColumns], odd[kRows][kColumns];
  unrolled<kRows>(
      [&](auto i) { unrolled<kColumns>([&](auto j) { acc[i][j] = odd[i][j] = Int32x8{}; }); });
  const auto step = [&](int64_t at, const auto& load) {
    unrolled<2>([&](auto half) {
      __m256i w[kColumns];
      unrolled<kColumns>([&](auto j) { w[j] = load(half, rows[j], at + 32 * half); });
      unrolled<kRows>([&](auto i) {
        __m256i q = _mm256_load_si256(
            reinterpret_cast<const __m256i*>(x.q + i * x.stride + at + 32 * half));
        asm("" : "+x"(q));  // gcc would load it once for each column
        unrolled<kColumns>([&](auto j) {
          Int32x8& sum = kSets == 2 && half == 1 ? odd[i][j] : acc[i][j];
          sum = dot(sum, w[j], q);
        });
      });
    });
  };

  const int64_t whole_end = std::min(k.end, weight.whole_k);
  int64_t at = k.begin;
  for (; at < whole_end; at += 64) {
    if constexpr (FetchedAhead<Weight>) fetch_step(weight, x, at - k.begin);
    step(at, [&](auto half, const auto& row, int64_t from) {
      return weight.template load<half>(row, from);
    });
  }
  if (at < k.end)
    step(at, [&](auto half, const auto& row, int64_t from) {
      return weight.template load_tail<half>(row, from);
    });

  unrolled<kRows>([&](auto i) {
    __m256i total[kColumns];
    unrolled<kColumns>(
        [&](auto j) { total[j] = (__m256i)(kSets == 2 ? acc[i][j] + odd[i][j] : acc[i][j]); });
    auto* to = reinterpret_cast<__m128i*>(sums + i * kMaxBlockColumns);
    if constexpr (kColumns == 4) {
      const __m128i sum = sum_lanes(total[0], total[1], total[2], total[3]);
      _mm_store_si128(to, _mm_add_epi32(_mm_load_si128(to), sum));
    } else {
      const __m128i sum = sum_lanes(total[0], total[1], total[0], total[1]);
      _mm_storel_epi64(to, _mm_add_epi32(_mm_loadl_epi64(to), sum));
    }
  });
}

template <int kRows, class Weight>
void accumulate_tile(const Weight& weight, const TileRows& x, int64_t n, int64_t last_n,
                     const Slice& k, int32_t* sums) {
  // Twelve sums are what 16 registers hold beside two weights, an activation and a constant.
  constexpr int kColumns = kRows <= 2 ? 4 : 2;
  constexpr int kParts = kTileColumns / kColumns;
  for (int part = 0; part < kParts; ++part) {
    const int64_t j = part * kColumns;
    accumulate_columns<kRows, kColumns>(weight, part_of(x, part, kParts, k), n + j, last_n, k,
                                        sums + j);
  }
}

}  // namespace
}  // namespace trine
