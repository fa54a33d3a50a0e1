// The activations that a linear layer may apply to an output, in fp32, after the bias and before
// the one rounding to its type. Here for every processor: a fixed sequence of products, sums, one
// division and operations on bits, each rounded once, none contracted, so that all give the same
// bits. (On a CPU the compiler makes vector instructions of the loop in activate_all.)
//
//   relu       max(x, 0); NaN stays NaN
//   gelu       x * Phi(x), Phi being the normal distribution's function
//   gelu_tanh  x / (1 + exp(-2 u)), u = sqrt(2 / pi) * (x + 0.044715 x^3)
//
// Both GELUs are max(x, 0) - G(|x|): nothing cancels for x < 0, and for x > 0 G is the smaller
// part.
//   gelu:       G(t) = t * exp(-t^2 / 2) * R(t), R(t) = erfcx(t / sqrt(2)) / 2 as a fraction
//   gelu_tanh:  G(t) = t * exp(-2 u) / (1 + exp(-2 u))
// The exponent is taken as a sum of two floats, of which the first is a product of numbers of 12
// bits and so exact. Errors against the true value y, from millions of points (tests/
// test_activation.py):
//   gelu       |error| <= 2^-21 * max(|y|, 2^-24)
//   gelu_tanh  |error| <= 2^-22 * max(|y|, 2^-90)
// That is four units in the last place at x > 0; eight at x < 0, where x * (1 + erf(x / sqrt(2)))
// has lost all digits at -6. Beyond -13 (-9.9) G stays what it is there, below 2^-119. -0 gives -0.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TRINE_ANYWHERE __host__ __device__ __forceinline__
#else
#define TRINE_ANYWHERE [[maybe_unused]] inline
#endif

namespace trine {

enum class Activation { none, relu, gelu, gelu_tanh };

// gcc makes no vector instructions of a choice between floats where comparing them might trap.
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#pragma GCC push_options
#pragma GCC optimize("no-trapping-math")
#endif

namespace {  // kernel files include this: see float_types.h

TRINE_ANYWHERE uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
TRINE_ANYWHERE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// x without the last half of its digits: a product of two such is exact.
TRINE_ANYWHERE float first_half(float x) { return float_of(bits_of(x) & 0xfffff000u); }

// exp(-(a + rest) / 2) for 0 <= a <= 172 with the digits of a product of two first halves.
TRINE_ANYWHERE float exp_of_minus_half(float a, float rest) {
  constexpr float kHalfLog2E = 0x1.715476p-1f;
  // The high part times a whole number below 128 is exact, and so is its difference from a.
  constexpr float kTwoLn2High = 0x1.62e4p+0f, kTwoLn2Low = 0x1.7f7d1cp-19f;
  // Floats of this size are one apart: adding it rounds, half to even, and leaves the whole number
  // in the low bits.
  constexpr float kToWhole = 0x1.8p+23f;
  const float shifted = a * kHalfLog2E + kToWhole;
  const float n = shifted - kToWhole;
  const float f = ((a - n * kTwoLn2High) - n * kTwoLn2Low) + rest;
  // exp(-f / 2), |f| <= ln 2: minimax, relative error 2.1e-9.
  float e = 0x1.6ada78p-16f * f + -0x1.127528p-12f;
  e = e * f + 0x1.55585ep-9f;
  e = e * f + -0x1.5554p-6f;
  e = e * f + 0x1.fffffcp-4f;
  e = e * f + -0.5f;
  e = e * f + 1.0f;
  return float_of(bits_of(e) - (bits_of(shifted) << 23));  // e * 2^-n
}

// x, or -0 where it is negative; a zero keeps its sign.
TRINE_ANYWHERE float positive_part(float x) { return x < 0.0f ? -0.0f : x; }

// |x|, or `most` where that is less; NaN stays NaN.
TRINE_ANYWHERE float magnitude_up_to(float most, float x) {
  const float t = float_of(bits_of(x) & 0x7fffffffu);
  return most < t ? most : t;
}

TRINE_ANYWHERE float gelu(float x) {
  const float t = magnitude_up_to(13.0f, x);
  const float high = first_half(t), low = t - high;
  const float square = high * high, rest = low * (t + high), t2 = square + rest;
  // R: minimax in the relative error, 5.3e-8 where G >= 2^-24 and less beyond as it falls.
  const float p = (0.5f + 0x1.534976p-2f * t) + t2 * (0x1.a4e2e2p-4f + 0x1.b2525cp-7f * t);
  const float q = (1.0f + 0x1.75e6c2p+0f * t) +
                  t2 * ((0x1.bde4eep-1f + 0x1.072118p-2f * t) + t2 * 0x1.105cd0p-5f);
  return positive_part(x) - (t * exp_of_minus_half(square, rest)) * (p / q);
}

TRINE_ANYWHERE float gelu_tanh(float x) {
  // 4 u = t * (a + b t^2); the digits of a and b in two parts, 12 in the first.
  constexpr float kA = 0x1.988454p+1f, kAHigh = 0x1.988p+1f, kALow = 0x1.14cf50p-13f;
  constexpr float kB = 0x1.2444f2p-3f, kBHigh = 0x1.244p-3f, kBLow = 0x1.3ca936p-17f;
  const float t = magnitude_up_to(9.9f, x);
  const float high = first_half(t), low = t - high;
  const float square = high * high, rest = low * (t + high);
  const float square_high = first_half(square), square_low = square - square_high;
  const float sum = kA + kB * (square + rest);
  const float sum_high = first_half(sum);
  const float sum_low = ((kAHigh - sum_high) + kBHigh * square_high) +
                        (((kBHigh * square_low + kBLow * square) + kB * rest) + kALow);
  const float e = exp_of_minus_half(high * sum_high, high * sum_low + low * sum);
  return positive_part(x) - (t * e) / (1.0f + e);
}

TRINE_ANYWHERE float activated(Activation activation, float x) {
  switch (activation) {
    case Activation::relu:
      return x < 0.0f ? 0.0f : x;
    case Activation::gelu:
      return gelu(x);
    case Activation::gelu_tanh:
      return gelu_tanh(x);
    default:
      return x;
  }
}

}  // namespace

#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#pragma GCC pop_options
#endif

}  // namespace trine
