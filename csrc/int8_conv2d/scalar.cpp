#include "int8_conv2d/conv.h"

namespace trine {
namespace {

struct Scalar {
  static constexpr uint8_t kOffset = 0;
  static constexpr int kMostBlocks = 1;
  static constexpr int pixels(int) { return 1; }

  struct Sum {
    int32_t lanes[kConvBlock];
  };
  using Weight = const int8_t*;
  using Quad = const int8_t*;

  static Sum zero() { return {}; }
  static Weight load(const int8_t* weight) { return weight; }
  static Quad spread(const uint8_t* q) { return reinterpret_cast<const int8_t*>(q); }
  static void dot(Sum& sum, Quad q, Weight w) {
    for (int64_t n = 0; n < kConvBlock; ++n)
      for (int64_t i = 0; i < kConvQuad; ++i) sum.lanes[n] += int32_t{q[i]} * w[n * kConvQuad + i];
  }

  static constexpr int kTapPixels = 1;
  using Tap = const int8_t*;
  static Tap load_tap(const int8_t* weight) { return weight; }
  static void add_tap(Sum& sum, const int8_t* q, Tap tap) {
    for (int64_t n = 0; n < kConvBlock; ++n) sum.lanes[n] += int32_t{q[n]} * tap[n];
  }

  static void write(const Sum& sum, int32_t* to) { std::memcpy(to, sum.lanes, sizeof sum.lanes); }
};

}  // namespace

const Int8Conv2dKernel int8_conv2d_scalar = conv_kernel<Scalar>();

}  // namespace trine
