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

template <class T>
void store_values(const Finish& f, const float* values, T* y, int64_t y_stride) {
  for (int64_t i = 0; i < f.rows; ++i, values += f.columns)
    for (int64_t n = 0; n < f.columns; n += 8)
      store_floats(load_floats(values + n, f.columns - n), y + i * y_stride + n, f.columns - n);
}

// Adding -0 changes no float, as no bias must.
template <class Weight, class T>
void finish_sums(const Weight&, const Finish& f, T* y, int64_t y_stride) {
  const auto finish = [&](int64_t n, int64_t lanes) __attribute__((always_inline)) {
    const __m256i column_minus =
        f.column_minus == nullptr ? _mm256_setzero_si256()
                                  : _mm256_maskload_epi32(f.column_minus + n, first_lanes(lanes));
    const __m256 weight_scale =
        f.per_tensor ? _mm256_set1_ps(*f.weight_scale) : load_floats(f.weight_scale + n, lanes);
    const __m256 bias = f.bias == nullptr ? _mm256_set1_ps(-0.0f) : load_floats(f.bias + n, lanes);
    for (int64_t i = 0; i < f.rows; ++i) {
      const __m256i minus = _mm256_set1_epi32(wrapping_product(f.offset, f.x_sum[i]));
      const __m256i sum =
          _mm256_load_si256(reinterpret_cast<const __m256i*>(f.sums + i * f.sums_stride + n));
      const __m256i acc = _mm256_sub_epi32(_mm256_sub_epi32(sum, minus), column_minus);
      const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(acc), _mm256_set1_ps(f.x_scale[i]));
      const __m256 value = _mm256_add_ps(_mm256_mul_ps(scaled, weight_scale), bias);
      // Its second operand where one is NaN.
      store_floats(_mm256_max_ps(_mm256_set1_ps(f.least), value), y + i * y_stride + n, lanes);
    }
  };
  int64_t n = 0;
  for (; n + 8 <= f.columns; n += 8) finish(n, 8);
  if (n < f.columns) finish(n, f.columns - n);
}

}  // namespace
}  // namespace trine
