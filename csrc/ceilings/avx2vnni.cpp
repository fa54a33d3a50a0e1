#include "ceilings/ceilings.h"
#include "common/x86/dot_avx2vnni.h"

namespace trine {

float dot_int8_avx2vnni(int64_t repeats) {
  volatile int hidden = 1;  // so that the compiler computes every round
  const __m256i a = _mm256_set1_epi8(static_cast<char>(hidden));
  Int32x8 sums[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) sums[i] = Int32x8{} + (hidden + i);
  for (int64_t i = 0; i < repeats; ++i)
    for (Int32x8& sum : sums) sum = dot(sum, a, a);
  for (int i = 1; i < kAccumulators; ++i) sums[0] += sums[i];
  int32_t total = 0;
  for (int lane = 0; lane < 8; ++lane) total += sums[0][lane];
  return static_cast<float>(total);
}

}  // namespace trine
