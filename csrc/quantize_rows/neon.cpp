// What bounds it: about 20 instructions per 8 values of fp32, 12 of them arithmetic; a Neoverse N1
// converts to integers in one of its two vector pipes, two cycles for four values. Counted, not
// timed.
#include "common/arm/float_neon.h"
#include "quantize_rows/rows.h"

namespace trine {
namespace {

struct Simd {
  static constexpr int64_t kLanes = 8;

  static Ints zero() { return all_lanes(0); }
  static Ints all(int32_t value) { return all_lanes(value); }
  static Floats all(float value) { return all_lanes(value); }

  static Ints magnitude(Floats v) {
    return both<Ints>(
        [](float32x4_t x) { return vandq_s32(vreinterpretq_s32_f32(x), vdupq_n_s32(0x7fffffff)); },
        v);
  }
  static Ints max(Ints a, Ints b) {
    return both<Ints>([](int32x4_t x, int32x4_t y) { return vmaxq_s32(x, y); }, a, b);
  }
  static uint32_t highest(Ints v) {
    return static_cast<uint32_t>(vmaxvq_s32(vmaxq_s32(v.low, v.high)));
  }

  static Floats multiply(Floats a, Floats b) {
    return both<Floats>([](float32x4_t x, float32x4_t y) { return vmulq_f32(x, y); }, a, b);
  }
  static Floats divide(Floats a, Floats b) {
    return both<Floats>([](float32x4_t x, float32x4_t y) { return vdivq_f32(x, y); }, a, b);
  }
  static Floats clamp(Floats v, Floats low, Floats high) {
    return both<Floats>([](float32x4_t x, float32x4_t least,
                           float32x4_t most) { return vminq_f32(vmaxq_f32(x, least), most); },
                        v, low, high);
  }
  static Ints rint(Floats v) {
    return both<Ints>([](float32x4_t x) { return vcvtnq_s32_f32(x); }, v);
  }

  static Ints add(Ints a, Ints b) {
    return both<Ints>([](int32x4_t x, int32x4_t y) { return vaddq_s32(x, y); }, a, b);
  }
  static int32_t sum(Ints v) { return vaddvq_s32(vaddq_s32(v.low, v.high)); }
  static Ints keep(Ints v, int64_t count) {
    if (count >= kLanes) return v;
    int32_t lanes[kLanes];
    vst1q_s32(lanes, v.low);
    vst1q_s32(lanes + 4, v.high);
    return load_ints(lanes, count);
  }
  static void store_bytes(Ints v, int8_t* p, int64_t count) {
    const int8x8_t bytes = vmovn_s16(vmovn_high_s32(vmovn_s32(v.low), v.high));
    int8_t lanes[kLanes];
    vst1_s8(lanes, bytes);
    std::memcpy(p, lanes, static_cast<std::size_t>(count));
  }
};

}  // namespace

void quantize_row_neon(const void* x, FloatType type, int64_t k, int8_t* q, float* scale,
                       int32_t* sum) {
  with_type(x, type, [&](const auto* row) { quantize_row<Simd>(row, k, q, scale, sum); });
}

void quantize_row_static_neon(const void* x, FloatType type, int64_t k, float input_scale,
                              int32_t input_zero_point, int8_t* q, float* scale, int32_t* sum) {
  with_type(x, type, [&](const auto* row) {
    quantize_row_static<Simd>(row, k, input_scale, input_zero_point, q, scale, sum);
  });
}

}  // namespace trine
