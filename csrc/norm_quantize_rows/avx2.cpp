#include "common/x86/float_avx2.h"
#include "norm_quantize_rows/rows.h"

namespace trine {
namespace {

struct Simd {
  static constexpr int64_t kLanes = 8;

  static __m256 all(float value) { return _mm256_set1_ps(value); }
  static __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  static __m256 multiply(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
  static void store(__m256 v, float* p) { _mm256_storeu_ps(p, v); }

  // Lane j: the sum of the values of load(j).
  template <class Load>
  static __m256 sum_each(const Load& load) {
    // Lane i of each half: the sum of that half of load(j + i).
    const auto four = [&](int64_t j) {
      const __m256 first = _mm256_hadd_ps(load(j), load(j + 1));
      return _mm256_hadd_ps(first, _mm256_hadd_ps(load(j + 2), load(j + 3)));
    };
    const __m256 a = four(0), b = four(4);
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
};

}  // namespace

void norm_row_avx2(const void* x, FloatType type, int64_t k, const NormOfRow& norm, void* y) {
  norm_row<Simd>(x, type, k, norm, y);
}

}  // namespace trine
