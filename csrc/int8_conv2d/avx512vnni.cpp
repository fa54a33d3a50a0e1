// INT8 convolution on AVX-512 VNNI, whose vpdpbusd multiplies unsigned activations: q + 128.
#include <immintrin.h>

#include "int8_conv2d/conv.h"

namespace trine {
namespace {

struct Vnni {
  static constexpr uint8_t kOffset = 128;
  static constexpr int kMostBlocks = 4;
  // 24 sums beside the weights and a quad; with one block 12 are enough to hide the latency.
  static constexpr int pixels(int blocks) { return blocks == 4 ? 6 : 12; }

  using Sum = int32_t __attribute__((vector_size(64)));  // gcc 12 spills arrays of __m512i
  using Weight = __m512i;
  using Quad = __m512i;

  static Sum zero() { return Sum{}; }
  static Weight load(const int8_t* weight) { return _mm512_loadu_si512(weight); }
  static Quad spread(const uint8_t* at) {
    int32_t four;
    std::memcpy(&four, at, 4);
    return _mm512_set1_epi32(four);
  }
  static void dot(Sum& sum, Quad quad, Weight w) {
    sum = reinterpret_cast<Sum>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), quad, w));
  }

  // One vpdpwssd for 16 channels: a lane holds the activation twice as wide as it is, and the
  // weight with 0 in its upper half, so that the second product is 0.
  static constexpr int kTapPixels = 8;
  using Tap = __m512i;
  static __m512i widened(const int8_t* at) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }
  static Tap load_tap(const int8_t* weight) {
    return _mm512_and_si512(widened(weight), _mm512_set1_epi32(0xffff));
  }
  static void add_tap(Sum& sum, const int8_t* q, Tap tap) {
    sum =
        reinterpret_cast<Sum>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum), widened(q), tap));
  }

  static void write(const Sum& sum, int32_t* to) {
    _mm512_storeu_si512(to, reinterpret_cast<__m512i>(sum));
  }
};

}  // namespace

const Int8Conv2dKernel int8_conv2d_avx512vnni = conv_kernel<Vnni>();

}  // namespace trine
