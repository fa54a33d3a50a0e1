// The activations that a linear layer may apply to an output, in fp32, after the bias and before
// the one rounding to its type. Here for every processor: a fixed sequence of products, sums and
// operations on bits, each rounded once, none contracted, so that all give the same bits. (On a CPU
// the compiler makes vector instructions of the loops in activate_all.h.)
//
//   relu       max(x, 0); NaN stays NaN
//   gelu       x * Phi(x), Phi being the normal distribution's function
//   gelu_tanh  x / (1 + exp(-2 u)), u = sqrt(2 / pi) * (x + 0.044715 x^3)
//
// Both GELUs are max(x, 0) - |x| Q(|x|), where Q falls from 1/2 to 0: nothing cancels for x < 0,
// and for x > 0 the product is the smaller part. The eighth root of Q is so near to a polynomial P
// that no exponential and no division are needed:
//   y = max(x, 0) - t P(t)^8, t = |x|, kept at 8 (gelu_tanh: 6), where P is 0.001
// P is minimax for the error of y, relative where y < -0.05 and to 0.05 elsewhere.
// Errors against the true value y, from millions of points (tests/test_activation.py):
//   |error| <= 2^-19 * max(|y|, |x| / 2^8), and <= 2.5e-7
// torch.nn.functional.gelu in fp32 is up to 1.2e-6 (tanh: 4.4e-7) away. For x < -8 (-6) y stays
// what it is there, some -8e-24. -0 gives -0.
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

// x, or -0 where it is negative; a zero keeps its sign.
TRINE_ANYWHERE float positive_part(float x) { return x < 0.0f ? -0.0f : x; }

// |x|, or `most` where that is less; NaN stays NaN.
TRINE_ANYWHERE float magnitude_up_to(float most, float x) {
  const float t = float_of(bits_of(x) & 0x7fffffffu);
  return most < t ? most : t;
}

TRINE_ANYWHERE float gelu_from(float x, float t, float p) {
  const float p2 = p * p, p4 = p2 * p2;
  return positive_part(x) - t * (p4 * p4);
}

TRINE_ANYWHERE float gelu(float x) {
  const float t = magnitude_up_to(8.0f, x);
  float p = -0x1.410c5cp-22f * t + 0x1.f8638ep-18f;
  p = p * t + -0x1.fac0d6p-15f;
  p = p * t + 0x1.219df2p-15f;
  p = p * t + 0x1.8a64cep-10f;
  p = p * t + -0x1.60b8b0p-11f;
  p = p * t + -0x1.058c2ap-5f;
  p = p * t + -0x1.769c6ep-4f;
  p = p * t + 0x1.d5818ep-1f;
  return gelu_from(x, t, p);
}

TRINE_ANYWHERE float gelu_tanh(float x) {
  const float t = magnitude_up_to(6.0f, x);
  float p = -0x1.1b7782p-24f * t + 0x1.9c7628p-20f;
  p = p * t + -0x1.ea106ep-17f;
  p = p * t + 0x1.299642p-14f;
  p = p * t + -0x1.745fc4p-13f;
  p = p * t + 0x1.a6afaep-13f;
  p = p * t + -0x1.08c300p-12f;
  p = p * t + 0x1.c59e3ep-10f;
  p = p * t + -0x1.5bd14ep-11f;
  p = p * t + -0x1.057030p-5f;
  p = p * t + -0x1.769d80p-4f;
  p = p * t + 0x1.d5818ep-1f;
  return gelu_from(x, t, p);
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
