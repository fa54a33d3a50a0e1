// 2^x and 2^x - 1 of a vector. Static for the reason given in float_types.h.
#pragma once

#include <algorithm>
#include <limits>

#include "softmax_kl/sums.h"

namespace trine {
namespace {

// 2^x = 2^i * 2^f with i = round(x) and |f| <= 1/2. Adding 1.5 * 2^23 rounds to an integer, which
// then lies in the low bits; 127 is the exponent bias. Where a register holds a table of 16 floats
// (V::kTables) x is rounded to sixteenths, so that |f| <= 1/32 takes half of the multiplications.
template <class V>
constexpr float kRound = V::kTables ? 0x1.8p+19f + 127.0f : 0x1.8p+23f + 127.0f;
// Here the biased exponent is 0, and so 2^i becomes 0.
constexpr float kPowerIsZero = -127.0f;
// 2^f - 1 = f * P(f): minimax in the relative error (1.1e-8; of sixteenths 1.1e-7), computed with
// Remez' algorithm in 40 digits and rounded to fp32.
constexpr float kP0 = 0x1.62e430p-1f, kP1 = 0x1.ebfbdep-3f, kP2 = 0x1.c6af6ep-5f,
                kP3 = 0x1.3b2ba0p-7f, kP4 = 0x1.5f07b4p-10f, kP5 = 0x1.4308fap-13f;
constexpr float kSixteenthP1 = 0x1.ebff92p-3f, kSixteenthP2 = 0x1.c6b08ep-5f;
// The mantissas of 2^(j / 16).
alignas(64) constexpr int32_t kPowersOfSixteenths[16] = {
    0x000000, 0x05aac3, 0x0b95c2, 0x11c3d3, 0x1837f0, 0x1ef532, 0x25fed7, 0x2d583f,
    0x3504f3, 0x3d08a4, 0x45672a, 0x4e248c, 0x5744fd, 0x60ccdf, 0x6ac0c7, 0x75257d};

// What those lack, of 2^(j / 16 - 1), where 2^x - 1 is small enough to show it.
alignas(64) constexpr float kRestsOfPowers[16] = {
    0x0.0p+0f,        0x1.9f3122p-26f,  -0x1.c15742p-28f, 0x1.ceac48p-26f,
    0x1.4636e2p-26f,  0x1.824684p-26f,  -0x1.593abcp-26f, -0x1.5bd5ecp-28f,
    0x1.9fcef4p-27f,  -0x1.829fd0p-26f, 0x1.15506ep-28f,  0x1.51f848p-28f,
    -0x1.a94b14p-27f, -0x1.3d56b2p-28f, -0x1.822dbcp-28f, 0x1.52486cp-28f};

// 2^x as 2^i and 2^f - 1.
template <class V>
struct Power {
  V whole, fraction_minus_1;
  V shifted;

  V value() const { return V::mul_add(whole, fraction_minus_1, whole); }
  // Relative to the result for every x: where 2^i is 1 the difference is exactly 0.
  V minus_1() const {
    V difference = whole - V(1.0f);
    if constexpr (V::kTables) difference = difference + V::look_up(kRestsOfPowers, shifted);
    return V::mul_add(whole, fraction_minus_1, difference);
  }
};

// From i + kRound and f.
template <class V>
Power<V> power(V shifted, V f) {
  if constexpr (V::kTables) {
    const V p = V::mul_add(V(kSixteenthP2), f, V(kSixteenthP1));
    return {V::power_of_sixteenths(shifted), V::mul_add(p, f, V(kP0)) * f, shifted};
  } else {
    V p = V::mul_add(V(kP5), f, V(kP4));
    p = V::mul_add(p, f, V(kP3));
    p = V::mul_add(p, f, V(kP2));
    p = V::mul_add(p, f, V(kP1));
    p = V::mul_add(p, f, V(kP0));
    return {V::low_bits_to_exponent(shifted), p * f, shifted};
  }
}

// 2^x for kPowerIsZero <= x <= 0.
template <class V>
Power<V> power_of_2(V x) {
  const V shifted = x + V(kRound<V>);
  return power(shifted, x - (shifted - V(kRound<V>)));
}

// exp(d / T) for d <= 0; NaN stays NaN. Numbers that are the same in all lanes are kept as such:
// the compiler would not see that the halves of a V of two vectors are equal.
template <class V>
struct Exponential {
  float rate, lowest;

  explicit Exponential(float rate)
      : rate(rate), lowest(std::max(kPowerIsZero / rate, -std::numeric_limits<float>::max())) {}

  // The product is not rounded before its fraction is taken.
  V operator()(V d) const {
    d = V::max(V(lowest), d);
    const V shifted = V::mul_add(d, V(rate), V(kRound<V>));
    return power(shifted, V::fused_mul_add(d, V(rate), V(kRound<V>) - shifted)).value();
  }
};

}  // namespace
}  // namespace trine
