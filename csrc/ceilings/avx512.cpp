#include <immintrin.h>

#include "ceilings/ceilings.h"
#include "ceilings/read.h"

namespace trine {
namespace {

int opaque(int value) {
  volatile int hidden = value;
  return hidden;
}

}  // namespace

uint64_t read_avx512(const void* data, int64_t bytes, int streams, int64_t ahead) {
  return read_streams<Vector64>(data, bytes, streams, ahead);
}

// Without VNNI: maddubs and an addition in int16, as in avx2.cpp.
float dot_int8_avx512(int64_t repeats) {
  const __m512i a = _mm512_set1_epi8(static_cast<char>(opaque(1)));
  __m512i b = a;
  __m512i sums[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) sums[i] = _mm512_set1_epi32(opaque(i));
  for (int64_t i = 0; i < repeats; ++i)
    for (__m512i& sum : sums) {
      asm(""
          : "+v"(b));  // no instruction: the compiler must take b for changed, and multiply again
      sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(a, b));
    }
  for (int i = 1; i < kAccumulators; ++i) sums[0] = _mm512_add_epi32(sums[0], sums[i]);
  return static_cast<float>(_mm512_reduce_add_epi32(sums[0]));
}

float fma_fp32_avx512(int64_t repeats) {
  const __m512 a = _mm512_set1_ps(0.5f * static_cast<float>(opaque(1)));
  __m512 sums[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) sums[i] = _mm512_set1_ps(static_cast<float>(opaque(i)));
  for (int64_t i = 0; i < repeats; ++i)
    for (__m512& sum : sums) sum = _mm512_fmadd_ps(sum, a, a);
  for (int i = 1; i < kAccumulators; ++i) sums[0] = _mm512_add_ps(sums[0], sums[i]);
  return _mm512_cvtss_f32(sums[0]);
}

}  // namespace trine
