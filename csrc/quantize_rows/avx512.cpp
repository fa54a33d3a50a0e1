// What bounds it: the reading of x, and about ten instructions per 16 values.
#include "common/x86/float_avx512.h"
#include "quantize_rows/rows.h"

namespace trine {
namespace {

struct Simd {
  static constexpr int64_t kLanes = 16;

  static __m512i zero() { return _mm512_setzero_si512(); }
  static __m512i all(int32_t value) { return _mm512_set1_epi32(value); }
  static __m512 all(float value) { return _mm512_set1_ps(value); }

  static __m512i magnitude(__m512 v) {
    return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
  }
  static __m512i max(__m512i a, __m512i b) { return _mm512_max_epi32(a, b); }
  static uint32_t highest(__m512i v) { return _mm512_reduce_max_epu32(v); }

  static __m512 multiply(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
  static __m512 divide(__m512 a, __m512 b) { return _mm512_div_ps(a, b); }
  static __m512 clamp(__m512 v, __m512 low, __m512 high) {
    return _mm512_min_ps(_mm512_max_ps(v, low), high);
  }
  static __m512i rint(__m512 v) { return _mm512_cvtps_epi32(v); }

  static __m512i add(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
  static int32_t sum(__m512i v) { return _mm512_reduce_add_epi32(v); }
  static __m512i keep(__m512i v, int64_t count) {
    return _mm512_maskz_mov_epi32(first_lanes(count), v);
  }
  static void store_bytes(__m512i v, int8_t* p, int64_t count) {
    _mm_mask_storeu_epi8(p, first_lanes(count), _mm512_cvtepi32_epi8(v));
  }
};

}  // namespace

void quantize_row_avx512(const void* x, FloatType type, int64_t k, int8_t* q, float* scale,
                         int32_t* sum) {
  with_type(x, type, [&](const auto* row) { quantize_row<Simd>(row, k, q, scale, sum); });
}

void quantize_row_static_avx512(const void* x, FloatType type, int64_t k, float input_scale,
                                int32_t input_zero_point, int8_t* q, float* scale, int32_t* sum) {
  with_type(x, type, [&](const auto* row) {
    quantize_row_static<Simd>(row, k, input_scale, input_zero_point, q, scale, sum);
  });
}

}  // namespace trine
