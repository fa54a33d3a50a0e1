// 32 columns of int8 values as dense bytes, with AVX2.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "sparse24_linear/int8_values.h"

namespace trine {
namespace {

// From 16 values and 8 nibbles; k is a multiple of 32.
[[maybe_unused]] inline __m256i decode_32(const SparseRow& row, int64_t k) {
  const __m256i shift = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  // vpermd looks at three bits: nibble + (nibble >> 3) tells the six ascending pairs apart there.
  const __m256i spread_of_key =
      _mm256_setr_epi32(0, spread(8), spread(9), 0, spread(4), spread(12), spread(13), spread(14));
  // Which two of the sixteen values a group takes.
  const __m256i pair = _mm256_setr_epi32(0, 0x02020202, 0x04040404, 0x06060606, 0x08080808,
                                         0x0a0a0a0a, 0x0c0c0c0c, 0x0e0e0e0e);

  int32_t indices;
  std::memcpy(&indices, row.indices + k / 8, sizeof indices);
  const __m256i nibbles = _mm256_srlv_epi32(_mm256_set1_epi32(indices), shift);
  const __m256i key = _mm256_add_epi32(
      nibbles, _mm256_and_si256(_mm256_srli_epi32(nibbles, 3), _mm256_set1_epi32(1)));
  const __m256i shuffle = _mm256_permutevar8x32_epi32(spread_of_key, key);
  const __m256i values = _mm256_broadcastsi128_si256(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(row.values + k / 2)));
  return _mm256_shuffle_epi8(values, _mm256_or_si256(shuffle, pair));
}

}  // namespace
}  // namespace trine
