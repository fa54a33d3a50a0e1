// 2^x and 2^x - 1 of a vector. Static for the reason given in float_types.h.
#pragma once

#include <algorithm>
#include <limits>

#include "softmax_kl/sums.h"

namespace trine {
namespace {

// 2^x = 2^i * 2^f with i = round(x) and |f| <= 1/2. Adding 1.5 * 2^23 rounds to an integer, which
// then lies in the low bits; 127 is the exponent bias.
constexpr float kRound = 0x1.8p+23f + 127.0f;
// Here the biased exponent is 0, and so 2^i becomes 0.
constexpr float kPowerIsZero = -127.0f;
// 2^f - 1 = f * P(f): minimax in the relative error (1.1e-8), computed with Remez' algorithm in 40
// digits and rounded to fp32.
constexpr float kP0 = 0x1.62e430p-1f, kP1 = 0x1.ebfbdep-3f, kP2 = 0x1.c6af6ep-5f,
                kP3 = 0x1.3b2ba0p-7f, kP4 = 0x1.5f07b4p-10f, kP5 = 0x1.4308fap-13f;

// 2^x as 2^i and 2^f - 1.
template <class V>
struct Power {
  V whole, fraction_minus_1;

  V value() const { return V::mul_add(whole, fraction_minus_1, whole); }
  // Relative to the result for every x: where 2^i is 1 the difference is exactly 0.
  V minus_1() const { return V::mul_add(whole, fraction_minus_1, whole - V(1.0f)); }
};

// From i + kRound and f.
template <class V>
Power<V> power(V shifted, V f) {
  V p = V::mul_add(V(kP5), f, V(kP4));
  p = V::mul_add(p, f, V(kP3));
  p = V::mul_add(p, f, V(kP2));
  p = V::mul_add(p, f, V(kP1));
  p = V::mul_add(p, f, V(kP0));
  return {V::low_bits_to_exponent(shifted), p * f};
}

// 2^x for x <= 0; NaN counts as -inf.
template <class V>
Power<V> power_of_2(V x) {
  x = V::max(x, V(kPowerIsZero));
  const V shifted = x + V(kRound);
  return power(shifted, x - (shifted - V(kRound)));
}

// exp(d / T) for d <= 0; NaN stays NaN.
template <class V>
struct Exponential {
  V rate, lowest;

  explicit Exponential(float rate)
      : rate(rate), lowest(std::max(kPowerIsZero / rate, -std::numeric_limits<float>::max())) {}

  // The product is not rounded before its fraction is taken.
  V operator()(V d) const {
    d = V::max(lowest, d);
    const V shifted = V::mul_add(d, rate, V(kRound));
    return power(shifted, V::fused_mul_add(d, rate, V(kRound) - shifted)).value();
  }
};

}  // namespace
}  // namespace trine
