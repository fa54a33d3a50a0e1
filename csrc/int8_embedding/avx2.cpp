// What bounds it: the memory of the rows, which nothing but the indices foretells, and writing y.
#include "common/x86/float_avx2.h"
#include "int8_embedding/row.h"

namespace trine {
namespace {

struct Simd {
  static constexpr int64_t kLanes = 8;

  static __m256 all(float value) { return _mm256_set1_ps(value); }
  static __m256 load_codes(const int8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
  static __m256 multiply(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
};

}  // namespace

void int8_embedding_avx2(const int8_t* codes, float scale, int64_t dim, FloatType type, void* y) {
  embed_row<Simd>(codes, scale, dim, type, y);
}

}  // namespace trine
