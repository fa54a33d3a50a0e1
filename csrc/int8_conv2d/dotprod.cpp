// INT8 convolution on Arm's sdot.
#include <arm_neon.h>

#include "int8_conv2d/conv.h"

namespace trine {
namespace {

struct Dotprod {
  static constexpr uint8_t kOffset = 0;
  static constexpr int kMostBlocks = 1;
  // 16 sums, 4 weights and 4 quads of the 32 registers.
  static constexpr int pixels(int) { return 4; }

  struct Sum {
    int32x4_t part[4];
  };
  struct Weight {
    int8x16_t part[4];
  };
  using Quad = int8x16_t;

  static Sum zero() { return {{vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)}}; }
  static Weight load(const int8_t* w) {
    return {{vld1q_s8(w), vld1q_s8(w + 16), vld1q_s8(w + 32), vld1q_s8(w + 48)}};
  }
  static Quad spread(const uint8_t* at) {
    int32_t four;
    std::memcpy(&four, at, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }
  static void dot(Sum& sum, Quad quad, const Weight& w) {
    for (int i = 0; i < 4; ++i) sum.part[i] = vdotq_s32(sum.part[i], w.part[i], quad);
  }

  static constexpr int kTapPixels = 4;
  struct Tap {
    int16x8_t low, high;
  };
  static Tap load_tap(const int8_t* weight) {
    const int8x16_t w = vld1q_s8(weight);
    return {vmovl_s8(vget_low_s8(w)), vmovl_s8(vget_high_s8(w))};
  }
  static void add_tap(Sum& sum, const int8_t* q, const Tap& tap) {
    const Tap x = load_tap(q);
    sum.part[0] = vmlal_s16(sum.part[0], vget_low_s16(x.low), vget_low_s16(tap.low));
    sum.part[1] = vmlal_s16(sum.part[1], vget_high_s16(x.low), vget_high_s16(tap.low));
    sum.part[2] = vmlal_s16(sum.part[2], vget_low_s16(x.high), vget_low_s16(tap.high));
    sum.part[3] = vmlal_s16(sum.part[3], vget_high_s16(x.high), vget_high_s16(tap.high));
  }

  static void write(const Sum& sum, int32_t* to) {
    for (int i = 0; i < 4; ++i) vst1q_s32(to + 4 * i, sum.part[i]);
  }
};

}  // namespace

const Int8Conv2dKernel int8_conv2d_dotprod = conv_kernel<Dotprod>();

}  // namespace trine
