// Sixteen floats at a time, from and to the three floating types that ops take (AVX-512 F, BW, VL).
//
// `count` in [1, 16] is how many elements exist: lanes beyond them read as zero and are never
// written. The results equal those of widen and narrow in common/float_types.h, except that a NaN
// stored as float16 keeps its payload.
#pragma once

#include <immintrin.h>

#include "common/float_types.h"

namespace trine {
namespace {

[[maybe_unused]] inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? __mmask16(0xffff) : __mmask16((1u << count) - 1u);
}

[[maybe_unused]] inline __m512 load_floats(const float* p, int64_t count = 16) {
  return count >= 16 ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(first_lanes(count), p);
}
[[maybe_unused]] inline __m256i load_16_bits(const void* p, int64_t count) {
  return count >= 16 ? _mm256_loadu_si256(static_cast<const __m256i*>(p))
                     : _mm256_maskz_loadu_epi16(first_lanes(count), p);
}
[[maybe_unused]] inline __m512 load_floats(const bfloat16* p, int64_t count = 16) {
  const __m512i wide = _mm512_cvtepu16_epi32(load_16_bits(p, count));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
[[maybe_unused]] inline __m512 load_floats(const float16* p, int64_t count = 16) {
  return _mm512_cvtph_ps(load_16_bits(p, count));
}

// A masked store takes Zen 4 several cycles even where it writes every lane.
[[maybe_unused]] inline void store_16_bits(__m256i bits, void* p, int64_t count) {
  if (count >= 16) return _mm256_storeu_si256(static_cast<__m256i*>(p), bits);
  _mm256_mask_storeu_epi16(p, first_lanes(count), bits);
}

[[maybe_unused]] inline void store_floats(__m512 v, float* p, int64_t count = 16) {
  if (count >= 16) return _mm512_storeu_ps(p, v);
  _mm512_mask_storeu_ps(p, first_lanes(count), v);
}
[[maybe_unused]] inline void store_floats(__m512 v, bfloat16* p, int64_t count = 16) {
  // As narrow: half of the last kept bit, or one less for an even one, is added before the cut.
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0));
  store_16_bits(_mm512_cvtepi32_epi16(result), p, count);
}
// Thirty-two bf16 at once as their even and their odd ones, which costs a third of two loads and
// two stores in order. Stored values are rounded as above; a NaN must be as arithmetic makes it,
// for other payloads might be rounded up to no NaN.
struct EvenOdd {
  __m512 even, odd;
};
[[maybe_unused]] inline EvenOdd load_even_odd(const bfloat16* p) {
  const __m512i bits = _mm512_loadu_si512(p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(int(0xffff0000))))};
}
[[maybe_unused]] inline void store_even_odd(EvenOdd v, bfloat16* p) {
  constexpr __mmask64 kLowHalves = 0x3333333333333333;  // bytes
  const __m512i even = _mm512_castps_si512(v.even), odd = _mm512_castps_si512(v.odd);
  const __m512i kept = _mm512_mask_alignr_epi8(odd, kLowHalves, even, even, 2);
  const __m512i cut = _mm512_mask_alignr_epi8(even, ~kLowHalves, odd, odd, 14);
  // cut + 0x7fff, or 0x8000 where the kept half is odd, carries into bit 16; avg(a, b) is
  // (a + b + 1) / 2, which keeps the carry as its highest bit.
  constexpr int kAndOr = 0xea;  // (a & b) | c
  const __m512i half =
      _mm512_ternarylogic_epi32(kept, _mm512_set1_epi16(1), _mm512_set1_epi16(0x7ffe), kAndOr);
  const __m512i carry = _mm512_srli_epi16(_mm512_avg_epu16(cut, half), 15);
  _mm512_storeu_si512(p, _mm512_add_epi16(kept, carry));
}
[[maybe_unused]] inline void store_floats(__m512 v, float16* p, int64_t count = 16) {
  store_16_bits(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), p, count);
}

}  // namespace
}  // namespace trine
