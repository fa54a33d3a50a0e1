// What the tiles of 256-bit registers share once their products are done: adding up lanes, and
// from sums to outputs.
#pragma once

#include <immintrin.h>

#include "common/gemm_blocking.h"
#include "common/x86/float_avx2.h"

namespace trine {
namespace {

// Each half of the result holds the sums of that half of a, b, c, d.
[[maybe_unused]] inline __m256i sum_within_halves(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
  return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}

// The sums of the int32 lanes of a, b, c, d.
[[maybe_unused]] inline __m128i sum_lanes(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i abcd = sum_within_halves(a, b, c, d);
  return _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1));
}

template <class Weight, class T>
void finish_row(const Weight&, const int32_t* sums, int64_t count, const RowScaling& row, T* y) {
  const __m256i minus = _mm256_set1_epi32(row.minus);
  const __m256 x_scale = _mm256_set1_ps(row.x_scale);
  __m256 weight_scale = _mm256_set1_ps(*row.weight_scale);
  for (int64_t n = 0; n < count; n += 8) {
    const int64_t lanes = std::min<int64_t>(8, count - n);
    __m256i acc =
        _mm256_sub_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(sums + n)), minus);
    if (row.column_minus != nullptr)
      acc = _mm256_sub_epi32(acc, _mm256_maskload_epi32(row.column_minus + n, first_lanes(lanes)));
    if (!row.per_tensor) weight_scale = load_floats(row.weight_scale + n, lanes);
    __m256 value = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(acc), x_scale), weight_scale);
    if (row.bias != nullptr) value = _mm256_add_ps(value, load_floats(row.bias + n, lanes));
    store_floats(value, y + n, lanes);
  }
}

}  // namespace
}  // namespace trine
