#include "common/x86/float_avx512.h"
#include "norm_quantize_rows/rows.h"

namespace trine {
namespace {

struct Simd {
  static constexpr int64_t kLanes = 16;

  static __m512 all(float value) { return _mm512_set1_ps(value); }
  static __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  static __m512 multiply(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
  static void store(__m512 v, float* p) { _mm512_storeu_ps(p, v); }

  // Lane j: the sum of the values of load(j).
  template <class Load>
  static __m512 sum_each(const Load& load) {
    // Of blocks of four lanes: two sums of a, two of b.
    const auto values = [](__m512 a, __m512 b) {
      return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
    };
    const auto four = [&](int64_t j) {
      return values(values(load(j), load(j + 1)), values(load(j + 2), load(j + 3)));
    };
    // The same of whole blocks: each lane is now of another vector.
    const auto blocks = [](__m512 a, __m512 b) {
      return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    const __m512 first = blocks(four(0), four(4));
    return blocks(first, blocks(four(8), four(12)));
  }
};

}  // namespace

void norm_row_avx512(const void* x, FloatType type, int64_t k, const NormOfRow& norm, void* y) {
  norm_row<Simd>(x, type, k, norm, y);
}

}  // namespace trine
