#include <immintrin.h>

#include "ceilings/ceilings.h"

namespace trine {

float dot_int8_avx512vnni(int64_t repeats) {
  volatile int hidden = 1;  // so that the compiler computes every round
  const __m512i a = _mm512_set1_epi8(static_cast<char>(hidden));
  __m512i sums[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) sums[i] = _mm512_set1_epi32(hidden + i);
  for (int64_t i = 0; i < repeats; ++i)
    for (__m512i& sum : sums) sum = _mm512_dpbusd_epi32(sum, a, a);
  for (int i = 1; i < kAccumulators; ++i) sums[0] = _mm512_add_epi32(sums[0], sums[i]);
  return static_cast<float>(_mm512_reduce_add_epi32(sums[0]));
}

}  // namespace trine
