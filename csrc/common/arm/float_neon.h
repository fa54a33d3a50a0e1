// Eight floats at a time, in two registers, from and to the three floating types that ops take
// (Armv8-A).
//
// `count` in [1, 8] is how many elements exist: lanes beyond them read as zero and are never
// written. The results equal those of widen and narrow in common/float_types.h, except that a NaN
// stored as float16 keeps its payload.
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "common/float_types.h"

namespace trine {
namespace {

// Two registers give two independent chains of instructions, and eight 16-bit values fill one.
struct Floats {
  float32x4_t low, high;
};
struct Ints {
  int32x4_t low, high;
};

// `operation` on both halves.
template <class Result, class Operation, class... Operands>
[[gnu::always_inline]] inline Result both(const Operation& operation, const Operands&... operand) {
  return {operation(operand.low...), operation(operand.high...)};
}

[[maybe_unused]] inline Floats all_lanes(float value) {
  return {vdupq_n_f32(value), vdupq_n_f32(value)};
}
[[maybe_unused]] inline Ints all_lanes(int32_t value) {
  return {vdupq_n_s32(value), vdupq_n_s32(value)};
}

[[maybe_unused]] inline Floats load_floats(const float* p, int64_t count = 8) {
  if (count >= 8) return {vld1q_f32(p), vld1q_f32(p + 4)};
  float lanes[8] = {};
  std::memcpy(lanes, p, static_cast<std::size_t>(count) * sizeof(float));
  return {vld1q_f32(lanes), vld1q_f32(lanes + 4)};
}
[[maybe_unused]] inline Ints load_ints(const int32_t* p, int64_t count = 8) {
  if (count >= 8) return {vld1q_s32(p), vld1q_s32(p + 4)};
  int32_t lanes[8] = {};
  std::memcpy(lanes, p, static_cast<std::size_t>(count) * sizeof(int32_t));
  return {vld1q_s32(lanes), vld1q_s32(lanes + 4)};
}
[[maybe_unused]] inline uint16x8_t load_16_bits(const void* p, int64_t count) {
  uint16_t lanes[8] = {};
  std::memcpy(lanes, p, static_cast<std::size_t>(count >= 8 ? 16 : 2 * count));
  return vld1q_u16(lanes);
}
[[maybe_unused]] inline Floats load_floats(const bfloat16* p, int64_t count = 8) {
  const uint16x8_t bits = load_16_bits(p, count);
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)),
          vreinterpretq_f32_u32(vshll_high_n_u16(bits, 16))};
}
[[maybe_unused]] inline Floats load_floats(const float16* p, int64_t count = 8) {
  const float16x8_t values = vreinterpretq_f16_u16(load_16_bits(p, count));
  return {vcvt_f32_f16(vget_low_f16(values)), vcvt_high_f32_f16(values)};
}

[[maybe_unused]] inline void store_floats(Floats v, float* p, int64_t count = 8) {
  float lanes[8];
  float* to = count >= 8 ? p : lanes;
  vst1q_f32(to, v.low);
  vst1q_f32(to + 4, v.high);
  if (count < 8) std::memcpy(p, lanes, static_cast<std::size_t>(count) * sizeof(float));
}
[[maybe_unused]] inline void store_16_bits(uint16x8_t bits, void* p, int64_t count) {
  uint16_t lanes[8];
  vst1q_u16(lanes, bits);
  std::memcpy(p, lanes, static_cast<std::size_t>(count >= 8 ? 16 : 2 * count));
}
[[maybe_unused]] inline void store_floats(Floats v, bfloat16* p, int64_t count = 8) {
  // As narrow: half of the last kept bit, or one less for an even one, is added before the cut.
  const auto rounded = [](float32x4_t value) {
    const uint32x4_t bits = vreinterpretq_u32_f32(value);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t sum = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    return vbslq_u32(vceqq_f32(value, value), sum, vdupq_n_u32(0x7fc00000));
  };
  store_16_bits(vshrn_high_n_u32(vshrn_n_u32(rounded(v.low), 16), rounded(v.high), 16), p, count);
}
// Sixteen bf16 at once as their even and their odd ones, which costs less than two loads and two
// stores in order. Stored values are rounded as above; a NaN must be as arithmetic makes it, for
// other payloads might be rounded up to no NaN.
struct EvenOdd {
  Floats even, odd;
};
[[maybe_unused]] inline EvenOdd load_even_odd(const bfloat16* p) {
  const auto* words = reinterpret_cast<const uint16_t*>(p);
  const uint32x4_t low = vreinterpretq_u32_u16(vld1q_u16(words));
  const uint32x4_t high = vreinterpretq_u32_u16(vld1q_u16(words + 8));
  const auto even = [](uint32x4_t pair) { return vreinterpretq_f32_u32(vshlq_n_u32(pair, 16)); };
  const auto odd = [](uint32x4_t pair) {
    return vreinterpretq_f32_u32(vandq_u32(pair, vdupq_n_u32(0xffff0000)));
  };
  return {{even(low), even(high)}, {odd(low), odd(high)}};
}
[[maybe_unused]] inline void store_even_odd(EvenOdd v, bfloat16* p) {
  const auto rounded = [](float32x4_t value) {
    const uint32x4_t bits = vreinterpretq_u32_f32(value);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
  };
  const auto store = [&](float32x4_t even, float32x4_t odd, bfloat16* to) {
    const uint32x4_t pair = vsriq_n_u32(rounded(odd), rounded(even), 16);
    vst1q_u16(reinterpret_cast<uint16_t*>(to), vreinterpretq_u16_u32(pair));
  };
  store(v.even.low, v.odd.low, p);
  store(v.even.high, v.odd.high, p + 8);
}
[[maybe_unused]] inline void store_floats(Floats v, float16* p, int64_t count = 8) {
  store_16_bits(vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(v.low), v.high)), p, count);
}

}  // namespace
}  // namespace trine
