// INT8 convolution on AVX2. |q| * (w with q's sign) is exact in maddubs: 128 * 127 * 2 < 2^15.
#include <immintrin.h>

#include "int8_conv2d/conv.h"

namespace trine {
namespace {

struct Avx2 {
  static constexpr uint8_t kOffset = 0;
  static constexpr int kMostBlocks = 1;
  // 8 sums, 2 weights, a quad, its magnitude, ones and what is on its way: 16 registers.
  static constexpr int pixels(int) { return 4; }

  struct Pair {
    __m256i low, high;  // channels 0..7 and 8..15
  };
  using Sum = Pair;
  using Weight = Pair;
  struct Quad {
    __m256i q, magnitude;
  };

  static Sum zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static Weight load(const int8_t* weight) {
    const auto* at = reinterpret_cast<const __m256i*>(weight);
    return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
  }
  static Quad spread(const uint8_t* at) {
    int32_t four;
    std::memcpy(&four, at, 4);
    const __m256i q = _mm256_set1_epi32(four);
    return {q, _mm256_abs_epi8(q)};
  }
  static __m256i products(const Quad& quad, __m256i w) {
    const __m256i pairs = _mm256_maddubs_epi16(quad.magnitude, _mm256_sign_epi8(w, quad.q));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  static void dot(Sum& sum, const Quad& quad, const Weight& w) {
    sum.low = _mm256_add_epi32(sum.low, products(quad, w.low));
    sum.high = _mm256_add_epi32(sum.high, products(quad, w.high));
  }

  // Lanes of 32 bits: the activation widened, the weight with 0 in its upper half, so that of the
  // two products of madd the second is 0.
  static constexpr int kTapPixels = 4;
  using Tap = Pair;
  static __m256i widened(const int8_t* at) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
  }
  static Tap load_tap(const int8_t* weight) {
    const __m256i lower = _mm256_set1_epi32(0xffff);
    return {_mm256_and_si256(widened(weight), lower), _mm256_and_si256(widened(weight + 8), lower)};
  }
  static void add_tap(Sum& sum, const int8_t* q, const Tap& tap) {
    sum.low = _mm256_add_epi32(sum.low, _mm256_madd_epi16(widened(q), tap.low));
    sum.high = _mm256_add_epi32(sum.high, _mm256_madd_epi16(widened(q + 8), tap.high));
  }

  static void write(const Sum& sum, int32_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), sum.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), sum.high);
  }
};

}  // namespace

const Int8Conv2dKernel int8_conv2d_avx2 = conv_kernel<Avx2>();

}  // namespace trine
