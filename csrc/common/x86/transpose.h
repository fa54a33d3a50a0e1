// Transposing blocks of floats (AVX).
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace trine {
namespace {

// to[j][i] = from[i][j], 8 x 8.
[[maybe_unused]] inline void transpose8x8(const float* from, int64_t from_stride, float* to,
                                          int64_t to_stride) {
  __m256 row[8], pair[8];
  for (int i = 0; i < 4; ++i) {  // lanes: columns 0..3 of rows i and i + 4; then columns 4..7
    const __m256 low = _mm256_loadu_ps(from + i * from_stride);
    const __m256 high = _mm256_loadu_ps(from + (i + 4) * from_stride);
    row[i] = _mm256_permute2f128_ps(low, high, 0x20);
    row[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
  }
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m256 a = pair[i + j], b = pair[i + j + 2];
      _mm256_storeu_ps(to + (i + 2 * j) * to_stride, _mm256_shuffle_ps(a, b, 0x44));
      _mm256_storeu_ps(to + (i + 2 * j + 1) * to_stride, _mm256_shuffle_ps(a, b, 0xee));
    }
}

}  // namespace
}  // namespace trine
