// fp32 products on NEON, see tiles.h.
//
// What bounds it, counted and not timed: with one row, for eight codes seven instructions on the
// vector pipes, of which a Neoverse N1 runs two in a cycle; with many, the multiply-adds: 24 to ten
// loads.
#include "common/arm/float_neon.h"
#include "int8_weight_linear/tiles.h"

namespace trine {
namespace {

struct Simd {
  static constexpr int64_t kLanes = 8;
  static constexpr int kTileRows = 3;                      // by 4 weight rows: 24 registers of sums
  static constexpr int kPanelRows = 6, kPanelVectors = 2;  // 24 of sums, 4 of weight

  using Vector = Floats;
  [[gnu::always_inline]] static Vector zero() { return all_lanes(0.0f); }
  [[gnu::always_inline]] static Vector load(const float* p) { return load_floats(p); }
  [[gnu::always_inline]] static void store(float* p, Vector v) { store_floats(v, p); }
  [[gnu::always_inline]] static Vector broadcast(const float* p) { return all_lanes(*p); }
  [[gnu::always_inline]] static Vector add(Vector a, Vector b) {
    return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)};
  }
  [[gnu::always_inline]] static Vector multiply_add(Vector a, Vector b, Vector c) {
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
  }
  [[gnu::always_inline]] static Vector multiply_add_step(Vector a, Vector b, Vector c) {
    return multiply_add(a, b, c);
  }
  static float total(Vector v) { return vaddvq_f32(vaddq_f32(v.low, v.high)); }

  [[gnu::always_inline]] static Vector load_codes(const int8_t* p) {
    const int16x8_t codes = vmovl_s8(vld1_s8(p));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(codes))),
            vcvtq_f32_s32(vmovl_s16(vget_high_s16(codes)))};
  }
  static void convert(const int8_t* const* rows, int64_t k, float* to, int64_t stride) {
    for (int half = 0; half < 2; ++half, rows += 4, to += 4) {
      int32x4_t by_row[4];
      for (int i = 0; i < 4; ++i) by_row[i] = vreinterpretq_s32_s8(vld1q_s8(rows[i] + k));
      const auto low01 = vreinterpretq_s64_s32(vzip1q_s32(by_row[0], by_row[1]));
      const auto high01 = vreinterpretq_s64_s32(vzip2q_s32(by_row[0], by_row[1]));
      const auto low23 = vreinterpretq_s64_s32(vzip1q_s32(by_row[2], by_row[3]));
      const auto high23 = vreinterpretq_s64_s32(vzip2q_s32(by_row[2], by_row[3]));
      // Each lane: four codes of one row.
      const int64x2_t quads[4] = {vzip1q_s64(low01, low23), vzip2q_s64(low01, low23),
                                  vzip1q_s64(high01, high23), vzip2q_s64(high01, high23)};
      unrolled<16>([&](auto i) __attribute__((always_inline)) {
        const int32x4_t code = vshlq_n_s32(vreinterpretq_s32_s64(quads[i / 4]), 24 - 8 * (i % 4));
        vst1q_f32(to + i * stride, vcvtq_f32_s32(vshrq_n_s32(code, 24)));
      });
    }
  }
};

}  // namespace

void int8_weight_widen_neon(const FloatRows& x, int64_t m, int64_t stride, void* to) {
  widen_row<Simd>(x, m, stride, to);
}

void int8_weight_linear_neon(const WideRows& x, const GroupedInt8Weight& weight,
                             const LinearOutput& out, const Tile& tile) {
  int8_weight_tile<Simd>(x, weight, out, tile);
}

}  // namespace trine
