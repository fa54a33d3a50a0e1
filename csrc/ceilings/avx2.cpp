#include <immintrin.h>

#include "ceilings/ceilings.h"
#include "ceilings/read.h"

namespace trine {
namespace {

// A value the compiler cannot see through, so that it computes every round.
int opaque(int value) {
  volatile int hidden = value;
  return hidden;
}

}  // namespace

uint64_t read_avx2(const void* data, int64_t bytes, int streams, int64_t ahead) {
  return read_streams<Vector32>(data, bytes, streams, ahead);
}

// The fewest instructions that any AVX2 product of bytes can take: maddubs, and an addition in
// int16. Ternary codes get by with that for many steps; INT8, whose sums need int32 at once, takes
// twice as many, so that its kernels end near half of this.
float dot_int8_avx2(int64_t repeats) {
  const __m256i a = _mm256_set1_epi8(static_cast<char>(opaque(1)));
  __m256i b = a;
  __m256i sums[kAddAccumulators];
  for (int i = 0; i < kAddAccumulators; ++i) sums[i] = _mm256_set1_epi32(opaque(i));
  for (int64_t i = 0; i < repeats; ++i)
    for (__m256i& sum : sums) {
      asm(""
          : "+x"(b));  // no instruction: the compiler must take b for changed, and multiply again
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
    }
  for (int i = 1; i < kAddAccumulators; ++i) sums[0] = _mm256_add_epi32(sums[0], sums[i]);
  return static_cast<float>(_mm256_extract_epi32(sums[0], 0));
}

float fma_fp32_avx2(int64_t repeats) {
  const __m256 a = _mm256_set1_ps(0.5f * static_cast<float>(opaque(1)));
  __m256 sums[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) sums[i] = _mm256_set1_ps(static_cast<float>(opaque(i)));
  for (int64_t i = 0; i < repeats; ++i)
    for (__m256& sum : sums) sum = _mm256_fmadd_ps(sum, a, a);
  for (int i = 1; i < kAccumulators; ++i) sums[0] = _mm256_add_ps(sums[0], sums[i]);
  return _mm256_cvtss_f32(sums[0]);
}

}  // namespace trine
