// What bounds it: the memory of the rows, which nothing but the indices foretells, and writing y.
#include "common/x86/float_avx512.h"
#include "int8_embedding/row.h"

namespace trine {
namespace {

struct Simd {
  static constexpr int64_t kLanes = 16;

  static __m512 all(float value) { return _mm512_set1_ps(value); }
  static __m512 load_codes(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  }
  static __m512 multiply(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
};

}  // namespace

void int8_embedding_avx512(const int8_t* codes, float scale, int64_t dim, FloatType type, void* y) {
  embed_row<Simd>(codes, scale, dim, type, y);
}

}  // namespace trine
