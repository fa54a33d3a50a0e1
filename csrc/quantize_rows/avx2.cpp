// What bounds it: the reading of x, and about ten instructions per 8 values.
#include "common/x86/float_avx2.h"
#include "quantize_rows/rows.h"

namespace trine {
namespace {

struct Simd {
  static constexpr int64_t kLanes = 8;

  static __m256i zero() { return _mm256_setzero_si256(); }
  static __m256i all(int32_t value) { return _mm256_set1_epi32(value); }
  static __m256 all(float value) { return _mm256_set1_ps(value); }

  static __m256i magnitude(__m256 v) {
    return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
  }
  static __m256i max(__m256i a, __m256i b) { return _mm256_max_epi32(a, b); }
  static uint32_t highest(__m256i v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(1, 0, 3, 2)));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(2, 3, 0, 1)));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
  }

  static __m256 multiply(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
  static __m256 divide(__m256 a, __m256 b) { return _mm256_div_ps(a, b); }
  static __m256 clamp(__m256 v, __m256 low, __m256 high) {
    return _mm256_min_ps(_mm256_max_ps(v, low), high);
  }
  static __m256i rint(__m256 v) { return _mm256_cvtps_epi32(v); }

  static __m256i add(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }
  static int32_t sum(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, _MM_SHUFFLE(1, 0, 3, 2)));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtsi128_si32(s);
  }
  static __m256i keep(__m256i v, int64_t count) { return _mm256_and_si256(v, first_lanes(count)); }
  static void store_bytes(__m256i v, int8_t* p, int64_t count) {
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i bytes = _mm_packs_epi16(words, words);
    std::memcpy(p, &bytes, static_cast<std::size_t>(count));
  }
};

}  // namespace

void quantize_row_avx2(const void* x, FloatType type, int64_t k, int8_t* q, float* scale,
                       int32_t* sum) {
  with_type(x, type, [&](const auto* row) { quantize_row<Simd>(row, k, q, scale, sum); });
}

void quantize_row_static_avx2(const void* x, FloatType type, int64_t k, float input_scale,
                              int32_t input_zero_point, int8_t* q, float* scale, int32_t* sum) {
  with_type(x, type, [&](const auto* row) {
    quantize_row_static<Simd>(row, k, input_scale, input_zero_point, q, scale, sum);
  });
}

}  // namespace trine
