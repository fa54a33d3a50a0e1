// The divergences but the Kullback-Leibler ones, as functions of the two probabilities of a class,
// p of the student and q of the teacher; softmax_kl.h has their formulas. Of each is known here how
// the divergence changes with p and with q: its slopes, finite for every p and q.
//
// With e = min(p, q) / max(p, q) - 1, which is computed without cancellation, every logarithm and
// quotient of p, q and their mixtures is one of 1 + c * e.
#pragma once

#include <numbers>

#include "softmax_kl/exponential.h"

namespace trine {
namespace {

// -log(1 + f) = f * P(f) for 1 + f in [sqrt(1/2), sqrt(2)]: minimax in the relative error (2.7e-8).
constexpr float kL0 = -1.0f, kL1 = 0x1.fffff8p-2f, kL2 = -0x1.555792p-2f, kL3 = 0x1.000574p-2f,
                kL4 = -0x1.98b6fcp-3f, kL5 = 0x1.53317ep-3f, kL6 = -0x1.323b02p-3f,
                kL7 = 0x1.26454ap-3f, kL8 = -0x1.655140p-4f;

// A float's exponent of 2, from the square root of a half upwards: bits above these, over 2^23.
constexpr int32_t kBitsOfSquareRootOfHalf = 0x3f3504f3;

// -log(1 + z) for -1 < z <= 0.
template <class V>
[[gnu::always_inline]] inline V minus_log_plus_1(V z) {
  const V w = z + V(1.0f);
  const V exponent = V::exponent(w);  // of 2, so that w / 2^exponent is within sqrt(2) of 1
  const V mantissa = w * V::low_bits_to_exponent(V(kRound) - exponent);
  // Where the exponent is 0 the rounding of 1 + z would be all of a small z.
  const V f = V::select(V::greater(z, V(-0.29f)), z, mantissa - V(1.0f));
  V p = V::mul_add(V(kL8), f, V(kL7));
  p = V::mul_add(p, f, V(kL6));
  p = V::mul_add(p, f, V(kL5));
  p = V::mul_add(p, f, V(kL4));
  p = V::mul_add(p, f, V(kL3));
  p = V::mul_add(p, f, V(kL2));
  p = V::mul_add(p, f, V(kL1));
  p = V::mul_add(p, f, V(kL0));
  return V::mul_add(exponent, V(-float(std::numbers::ln2)), p * f);
}

// What a divergence is a function of, at some classes.
template <class V>
struct Classes {
  V p, q;           // times a factor of the caller's
  V log2_quotient;  // log2 of min(p, q) / max(p, q), at least -127
  V e;              // min(p, q) / max(p, q) - 1
  decltype(V::greater(V(0.0f), V(0.0f))) p_larger, q_larger;
};

template <class V>
struct Slopes {
  V student, teacher;
};

// beta * KL(q || m) + (1 - beta) * KL(p || m) with m = beta * q + (1 - beta) * p:
// its slopes are (1 - beta) * log(p / m) and beta * log(q / m).
template <class V>
struct JensenShannon {
  V beta, rest;

  explicit JensenShannon(float beta) : beta(beta), rest(1 - beta) {}

  [[gnu::always_inline]] Slopes<V> operator()(const Classes<V>& c) const {
    const V of_larger =
        minus_log_plus_1(V::select(c.p_larger, beta, rest) * c.e);  // log(larger / m)
    const V of_smaller = V::mul_add(c.log2_quotient, V(float(std::numbers::ln2)), of_larger);
    const V log_p = V::select(c.p_larger, of_larger, of_smaller);
    const V log_q = V::select(c.p_larger, of_smaller, of_larger);
    return {rest * log_p, beta * log_q};
  }
};

// KL(q || m) with m = beta * q + (1 - beta) * p. Its slopes are -(1 - beta) * q / m and
// log(q / m) + 1 - beta * q / m; a constant, the same in both, makes them 0 where p = q.
template <class V>
struct SkewedKl {
  V beta, rest;

  explicit SkewedKl(float beta) : beta(beta), rest(1 - beta) {}

  [[gnu::always_inline]] Slopes<V> operator()(const Classes<V>& c) const {
    const V z = V::select(c.p_larger, beta, rest) * c.e;             // m / larger - 1
    const V gap = c.e / (z + V(1.0f));                               // -|p - q| / m
    const V signed_gap = V::select(c.p_larger, gap, V(0.0f) - gap);  // (q - p) / m
    const V of_larger = minus_log_plus_1(z);
    const V of_smaller = V::mul_add(c.log2_quotient, V(float(std::numbers::ln2)), of_larger);
    const V log_q = V::select(c.p_larger, of_smaller, of_larger);
    const V common = rest * signed_gap;
    return {V(0.0f) - rest * common, log_q - beta * common};
  }
};

// sum of |p - q| / 2: its slopes are the sign of p - q and its opposite, halved.
template <class V>
struct TotalVariation {
  explicit TotalVariation(float) {}

  [[gnu::always_inline]] Slopes<V> operator()(const Classes<V>& c) const {
    const V zero(0.0f), half(0.5f), minus_half(-0.5f);
    return {V::select(c.p_larger, half, V::select(c.q_larger, minus_half, zero)),
            V::select(c.p_larger, minus_half, V::select(c.q_larger, half, zero))};
  }
};

// Calls body with the divergence that is meant.
template <class V, class Body>
auto with_divergence(Divergence divergence, const Body& body) {
  switch (divergence.kind) {
    case Divergence::jensen_shannon:
      return body(JensenShannon<V>(divergence.beta));
    case Divergence::skewed_kl:
      return body(SkewedKl<V>(divergence.beta));
    default:
      return body(TotalVariation<V>(divergence.beta));
  }
}

}  // namespace
}  // namespace trine
