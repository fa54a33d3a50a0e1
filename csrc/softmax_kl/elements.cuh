// softmax_kl of one class on a GPU: exponentials, and what the divergences make of them.
//
// fp32 logits get every digit (kPrecise): exponentials are polynomials, and differences of
// probabilities never cancel. For 16-bit logits, whose gradient is rounded to 2^-9, the
// multi-function unit's 2^-22 do, at a third of the instructions.
#pragma once

#include <limits>
#include <numbers>

#include "common/cuda/device.cuh"
#include "common/cuda/math.cuh"
#include "softmax_kl/cuda.h"
#include "softmax_kl/exponential.h"

namespace trine {
namespace {

constexpr float kLn2 = float(std::numbers::ln2), kLog2E = float(std::numbers::log2e);

// Of a maximum of nothing.
constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Adding it rounds to an integer, which then lies in the low bits, with the exponent's bias.
constexpr float kToInteger = 0x1.8p+23f + 127.0f;

// 2^x as 2^i and 2^f - 1; exponential.h has the polynomial and its error.
struct SplitPower {
  float whole, fraction_minus_1;

  __device__ __forceinline__ float value() const { return fmaf(whole, fraction_minus_1, whole); }
  __device__ __forceinline__ float minus_1() const {
    return fmaf(whole, fraction_minus_1, whole - 1.0f);
  }
};

__device__ __forceinline__ SplitPower split_power(float shifted, float f) {
  float p = fmaf(kP5, f, kP4);
  p = fmaf(p, f, kP3);
  p = fmaf(p, f, kP2);
  p = fmaf(p, f, kP1);
  p = fmaf(p, f, kP0);
  return {__uint_as_float(__float_as_uint(shifted) << 23), p * f};
}

// For x <= 0; NaN counts as -inf.
__device__ __forceinline__ SplitPower power_of_2(float x) {
  x = fmaxf(x, kPowerIsZero);
  const float shifted = x + kToInteger;
  return split_power(shifted, x - (shifted - kToInteger));
}

// 2^(distance * rate) for distance <= 0, the product not rounded; NaN stays NaN.
__device__ __forceinline__ float precise_power(float distance, float rate, float lowest) {
  const float d = distance < lowest ? lowest : distance;
  const float shifted = fmaf(d, rate, kToInteger);
  return split_power(shifted, fmaf(d, rate, kToInteger - shifted)).value();
}

// tanh: by 2^x - 1, so that it is relatively exact near 0.
__device__ __forceinline__ float tanh_of(float x) {
  const float e = power_of_2(fabsf(x) * (-2.0f / kLn2)).minus_1();  // exp(-2 |x|) - 1
  const float result = copysignf(e * reciprocal_approximate(2.0f + e), x);
  return x == x ? result : x;
}

// What a row's logits are measured from. None (-inf) counts as 0, so that -inf stays -inf.
struct Base {
  float origin, rate, offset, lowest;

  __device__ __forceinline__ Base(float origin, float rate)
      : origin(origin == kNone ? 0.0f : origin),
        rate(rate),
        offset(this->origin * rate),
        lowest(fmaxf(kPowerIsZero / rate, -kLargest)) {}
};

// distance: precise z - origin, otherwise that times the rate, in one rounding: the offset is
// rounded once for the whole row, and so cancels in p.
struct Exponent {
  float distance, power;
};

// log2 of the power.
template <bool kPrecise>
__device__ __forceinline__ float bits_of(float z, const Base& base) {
  return kPrecise ? (z - base.origin) * base.rate : fmaf(z, base.rate, -base.offset);
}

template <bool kPrecise>
__device__ __forceinline__ Exponent exponent_of(float z, const Base& base) {
  if constexpr (kPrecise) {
    const float distance = z - base.origin;
    return {distance, precise_power(distance, base.rate, base.lowest)};
  } else {
    const float distance = fmaf(z, base.rate, -base.offset);
    return {distance, exp2_approximate(distance)};
  }
}

// log2 of the quotient of both powers. Of equal rates exactly 0 for equal logits.
template <bool kPrecise>
__device__ __forceinline__ float difference_of(const Exponent& first, const Exponent& second,
                                               const Base& first_base, const Base& second_base) {
  if constexpr (!kPrecise) return first.distance - second.distance;
  if (first_base.rate == second_base.rate)
    return (first.distance - second.distance) * first_base.rate;
  return first.distance * first_base.rate - second.distance * second_base.rate;
}

// p - q from log2(p / q). Below kClose p - q would lose digits; (p + q) * tanh(log(p / q) / 2) does
// not, with two terms of its series (fitted to |x| <= 1/8: error 8e-8).
constexpr float kClose = 0.125f;
constexpr float kT0 = 0x1.62e42ep-2f, kT1 = -0x1.c6593ap-7f;

template <bool kPrecise>
__device__ __forceinline__ float gap(float p, float q, float log2_quotient) {
  if constexpr (kPrecise) {
    const bool p_larger = log2_quotient > 0;
    const float e = power_of_2(-fabsf(log2_quotient)).minus_1();
    return p_larger ? -p * e : q * e;
  } else {
    const float square = log2_quotient * log2_quotient;
    const float close = (p + q) * (log2_quotient * fmaf(kT1, square, kT0));
    return fabsf(log2_quotient) < kClose ? close : p - q;
  }
}

// -log(1 + z) for -1 < z <= 0.
__device__ __forceinline__ float minus_log_plus_1(float z) {
  // 2 * artanh(z / (2 + z)); four terms, whose error is 1e-7 at the bound.
  const float w = z * reciprocal_approximate(2.0f + z), square = w * w;
  float series = fmaf(square, 2.0f / 7, 2.0f / 5);
  series = fmaf(series, square, 2.0f / 3);
  series = fmaf(series, square, 2.0f);
  return z > -0.29f ? -w * series : -kLn2 * log2_approximate(1.0f + z);
}

// How a divergence that is not a Kullback-Leibler one changes with p and with q: divergences.h.
struct SlopesOfClass {
  float first, second;
};

__device__ __forceinline__ SlopesOfClass slopes_of(Divergence divergence, float log2_quotient) {
  const bool p_larger = log2_quotient > 0, q_larger = log2_quotient < 0;
  if (divergence.kind == Divergence::total_variation) {
    const float slope = p_larger ? 0.5f : q_larger ? -0.5f : 0.0f;
    return {slope, -slope};
  }
  const float beta = divergence.beta, rest = 1.0f - beta;
  const float of_smaller_to_larger = fmaxf(-fabsf(log2_quotient), kPowerIsZero);
  const float e = power_of_2(of_smaller_to_larger).minus_1();  // smaller / larger - 1
  const float z = (p_larger ? beta : rest) * e;                // m / larger - 1
  const float log_larger = minus_log_plus_1(z);                // log(larger / m)
  const float log_smaller = fmaf(of_smaller_to_larger, kLn2, log_larger);
  const float log_q = p_larger ? log_smaller : log_larger;
  if (divergence.kind == Divergence::jensen_shannon)
    return {rest * (p_larger ? log_larger : log_smaller), beta * log_q};
  const float gap = e * reciprocal_approximate(1.0f + z);  // -|p - q| / m
  const float common = rest * (p_larger ? gap : -gap);
  return {-rest * common, log_q - beta * common};
}

}  // namespace
}  // namespace trine
