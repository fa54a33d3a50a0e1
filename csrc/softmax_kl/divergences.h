// The divergences but the Kullback-Leibler ones, as functions of the two probabilities of a class,
// p of the student and q of the teacher; softmax_kl.h has their formulas. Of each is known here how
// the divergence changes with p and with q: its slopes, finite for every p and q.
//
// With e = min(p, q) / max(p, q) - 1 (`power.minus_1()`), which is computed without cancellation,
// every logarithm and quotient of p, q and their mixtures is one of 1 + c * e.
#pragma once

#include <numbers>

#include "softmax_kl/exponential.h"

namespace trine {
namespace {

// -log(1 + f) = f * P(f) for 1 + f in [sqrt(1/2), sqrt(2)]: minimax in the relative error (2.7e-8).
constexpr float kL0 = -1.0f, kL1 = 0x1.fffff8p-2f, kL2 = -0x1.555792p-2f, kL3 = 0x1.000574p-2f,
                kL4 = -0x1.98b6fcp-3f, kL5 = 0x1.53317ep-3f, kL6 = -0x1.323b02p-3f,
                kL7 = 0x1.26454ap-3f, kL8 = -0x1.655140p-4f;

// V::split_exponent(w) gives i * 2^23 and 2^-i, where w * 2^-i lies within sqrt(2) of 1: the bits
// of w above those of the square root of a half, as far as they are sign and exponent.
constexpr int32_t kBitsOfSquareRootOfHalf = 0x3f3504f3, kExponentAndSign = int32_t(0xff800000),
                  kBitsOf1 = 0x3f800000;

// The same for |f| <= 1/32 (4.8e-8). V::split_sixteenths(w) rounds w to c * 2^i with c in
// sixteenths, and gives i * 2^23, 1 / (c * 2^i), and log(1 / c); the tables hold 1 / c and its
// logarithm.
constexpr float kSixteenthL1 = 0x1.fffffep-2f, kSixteenthL2 = -0x1.558892p-2f,
                kSixteenthL3 = 0x1.00333ap-2f;
constexpr int kMantissaOfSixteenth = 1 << 19;
alignas(64) constexpr float kInverses[16] = {
    0x1.000000p+0f, 0x1.e1e1e2p-1f, 0x1.c71c72p-1f, 0x1.af286cp-1f, 0x1.99999ap-1f, 0x1.861862p-1f,
    0x1.745d18p-1f, 0x1.642c86p-1f, 0x1.555556p-1f, 0x1.47ae14p-1f, 0x1.3b13b2p-1f, 0x1.2f684cp-1f,
    0x1.24924ap-1f, 0x1.1a7b96p-1f, 0x1.111112p-1f, 0x1.084210p-1f};
alignas(64) constexpr float kLogsOfInverses[16] = {
    0x0.000000p+0f,  -0x1.f0a30ap-5f, -0x1.e27074p-4f, -0x1.5ff306p-3f,
    -0x1.c8ff7ap-3f, -0x1.1675cap-2f, -0x1.4618bap-2f, -0x1.739d7ep-2f,
    -0x1.9f323cp-2f, -0x1.c8ff7ep-2f, -0x1.f128f4p-2f, -0x1.0be72ep-1f,
    -0x1.1e85f4p-1f, -0x1.307d74p-1f, -0x1.41d8fcp-1f, -0x1.52a2d4p-1f};

// -log(1 + z) for -1 < z <= 0. (1 + z) * inverse - 1 is computed so that a small z is not rounded.
template <class V>
[[gnu::always_inline]] inline V minus_log_plus_1(V z) {
  const V w = z + V(1.0f), minus_log_2(float(-std::numbers::ln2 * 0x1p-23));
  if constexpr (V::kTables) {
    const auto [exponent, inverse, log_inverse] = V::split_sixteenths(w);
    const V f = V::mul_add(z, inverse, inverse - V(1.0f));
    V p = V::mul_add(V(kSixteenthL3), f, V(kSixteenthL2));
    p = V::mul_add(p, f, V(kSixteenthL1));
    p = V::mul_add(p, f, V(kL0));
    return V::mul_add(p, f, V::mul_add(exponent, minus_log_2, log_inverse));
  } else {
    const auto [exponent, inverse] = V::split_exponent(w);
    const V f = V::mul_add(z, inverse, inverse - V(1.0f));
    V p = V::mul_add(V(kL8), f, V(kL7));
    p = V::mul_add(p, f, V(kL6));
    p = V::mul_add(p, f, V(kL5));
    p = V::mul_add(p, f, V(kL4));
    p = V::mul_add(p, f, V(kL3));
    p = V::mul_add(p, f, V(kL2));
    p = V::mul_add(p, f, V(kL1));
    p = V::mul_add(p, f, V(kL0));
    return V::mul_add(exponent, minus_log_2, p * f);
  }
}

// What a divergence is a function of, at some classes.
template <class V>
struct Quotient {
  V log2;          // of min(p, q) / max(p, q), at least -127
  Power<V> power;  // min(p, q) / max(p, q)
  decltype(V::greater(V(0.0f), V(0.0f))) p_larger, q_larger;
};

// Over the factors that the divergence has for each.
template <class V>
struct Slopes {
  V student, teacher;
};

// log(max(p, q) / m) and log(min(p, q) / m) with m = beta * q + (1 - beta) * p.
template <class V>
struct OverMixture {
  float beta, rest;

  explicit OverMixture(float beta) : beta(beta), rest(1 - beta) {}

  [[gnu::always_inline]] V z(const Quotient<V>& c) const {  // m / max(p, q) - 1
    return V::select(c.p_larger, V(beta), V(rest)) * c.power.minus_1();
  }
  [[gnu::always_inline]] V smaller(const Quotient<V>& c, V larger) const {
    return V::mul_add(c.log2, V(float(std::numbers::ln2)), larger);
  }
};

// beta * KL(q || m) + (1 - beta) * KL(p || m) with m = beta * q + (1 - beta) * p:
// its slopes are (1 - beta) * log(p / m) and beta * log(q / m).
template <class V>
struct JensenShannon {
  OverMixture<V> mixture;
  float student_factor, teacher_factor;

  explicit JensenShannon(float beta)
      : mixture(beta), student_factor(1 - beta), teacher_factor(beta) {}

  [[gnu::always_inline]] Slopes<V> operator()(const Quotient<V>& c) const {
    const V larger = minus_log_plus_1(mixture.z(c)), smaller = mixture.smaller(c, larger);
    return {V::select(c.p_larger, larger, smaller), V::select(c.p_larger, smaller, larger)};
  }
};

// KL(q || m) with m = beta * q + (1 - beta) * p. Its slopes are -(1 - beta) * q / m and
// log(q / m) + 1 - beta * q / m; a constant, the same in both, makes them 0 where p = q.
template <class V>
struct SkewedKl {
  OverMixture<V> mixture;
  float student_factor, teacher_factor = 1;

  explicit SkewedKl(float beta) : mixture(beta), student_factor(-(1 - beta) * (1 - beta)) {}

  [[gnu::always_inline]] Slopes<V> operator()(const Quotient<V>& c) const {
    const V z = mixture.z(c);
    const V gap = c.power.minus_1() / (z + V(1.0f));                 // -|p - q| / m
    const V signed_gap = V::select(c.p_larger, gap, V(0.0f) - gap);  // (q - p) / m
    const V larger = minus_log_plus_1(z);
    const V log_q = V::select(c.p_larger, mixture.smaller(c, larger), larger);
    return {signed_gap, V::mul_add(V(-mixture.beta * mixture.rest), signed_gap, log_q)};
  }
};

// sum of |p - q| / 2: its slopes are the sign of p - q and its opposite, halved.
template <class V>
struct TotalVariation {
  float student_factor = 0.5f, teacher_factor = 0.5f;

  explicit TotalVariation(float) {}

  [[gnu::always_inline]] Slopes<V> operator()(const Quotient<V>& c) const {
    const V zero(0.0f), one(1.0f), minus_one(-1.0f);
    return {V::select(c.p_larger, one, V::select(c.q_larger, minus_one, zero)),
            V::select(c.p_larger, minus_one, V::select(c.q_larger, one, zero))};
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
