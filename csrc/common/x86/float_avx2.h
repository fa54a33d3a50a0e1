// Eight floats at a time, from and to the three floating types that ops take (AVX2, F16C).
//
// `count` in [1, 8] is how many elements exist: lanes beyond them read as zero and are never
// written. The results equal those of widen and narrow in common/float_types.h, except that a NaN
// stored as float16 keeps its payload.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "common/float_types.h"

namespace trine {
namespace {

[[maybe_unused]] inline __m256i first_lanes(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}

[[maybe_unused]] inline __m128i load_16_bits(const void* p, int64_t count) {
  __m128i bits = _mm_setzero_si128();
  std::memcpy(&bits, p, static_cast<std::size_t>(count >= 8 ? 16 : 2 * count));
  return bits;
}
[[maybe_unused]] inline void store_16_bits(__m128i bits, void* p, int64_t count) {
  std::memcpy(p, &bits, static_cast<std::size_t>(count >= 8 ? 16 : 2 * count));
}

[[maybe_unused]] inline __m256 load_floats(const float* p, int64_t count = 8) {
  return count >= 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, first_lanes(count));
}
[[maybe_unused]] inline __m256 load_floats(const bfloat16* p, int64_t count = 8) {
  const __m256i wide = _mm256_cvtepu16_epi32(load_16_bits(p, count));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
[[maybe_unused]] inline __m256 load_floats(const float16* p, int64_t count = 8) {
  return _mm256_cvtph_ps(load_16_bits(p, count));
}

[[maybe_unused]] inline void store_floats(__m256 v, float* p, int64_t count = 8) {
  if (count >= 8) return _mm256_storeu_ps(p, v);
  _mm256_maskstore_ps(p, first_lanes(count), v);
}
[[maybe_unused]] inline void store_floats(__m256 v, bfloat16* p, int64_t count = 8) {
  // As narrow: half of the last kept bit, or one less for an even one, is added before the cut.
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
  store_16_bits(
      _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1)), p,
      count);
}
// Sixteen bf16 at once as their even and their odd ones, which costs less than two loads and two
// stores in order. Stored values are rounded as above; a NaN must be as arithmetic makes it, for
// other payloads might be rounded up to no NaN.
struct EvenOdd {
  __m256 even, odd;
};
[[maybe_unused]] inline EvenOdd load_even_odd(const bfloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(int(0xffff0000))))};
}
[[maybe_unused]] inline void store_even_odd(EvenOdd v, bfloat16* p) {
  const auto rounded = [](__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  };
  constexpr int kHighHalves = 0xaa;
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(p),
      _mm256_blend_epi16(_mm256_srli_epi32(rounded(v.even), 16), rounded(v.odd), kHighHalves));
}
[[maybe_unused]] inline void store_floats(__m256 v, float16* p, int64_t count = 8) {
  store_16_bits(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), p, count);
}

}  // namespace
}  // namespace trine
