// Sixteen weight rows at once, transposed, on AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace trine {
namespace {

struct Floats512 {
  static constexpr int64_t kLanes = 16;
  using Vector = __m512;
  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static float total(Vector v) { return _mm512_reduce_add_ps(v); }
};

// Codes k .. k + 15 of sixteen rows: lane n of quad[i] is four of them, from k + 4 i on, of row n.
struct Quads {
  __m512i quad[4];

  Quads(const int8_t* const* rows, int64_t k) {
    __m512i by_row[4];  // lane 4 j + i of dwords: row 4 j + i
    for (int i = 0; i < 4; ++i) {
      const auto load = [&](int row) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + k));
      };
      const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(load(i)), load(4 + i), 1);
      const __m256i high =
          _mm256_inserti128_si256(_mm256_castsi128_si256(load(8 + i)), load(12 + i), 1);
      by_row[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    const __m512i low01 = _mm512_unpacklo_epi32(by_row[0], by_row[1]);
    const __m512i high01 = _mm512_unpackhi_epi32(by_row[0], by_row[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(by_row[2], by_row[3]);
    const __m512i high23 = _mm512_unpackhi_epi32(by_row[2], by_row[3]);
    quad[0] = _mm512_unpacklo_epi64(low01, low23);
    quad[1] = _mm512_unpackhi_epi64(low01, low23);
    quad[2] = _mm512_unpacklo_epi64(high01, high23);
    quad[3] = _mm512_unpackhi_epi64(high01, high23);
  }

  // Code k + i of each row.
  template <int i>
  __m512 floats() const {
    __m512i code = quad[i / 4];
    if constexpr (i % 4 < 3) code = _mm512_slli_epi32(code, 24 - 8 * (i % 4));
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(code, 24));
  }
};

}  // namespace
}  // namespace trine
