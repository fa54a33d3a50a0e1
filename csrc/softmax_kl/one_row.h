// What concerns the logits of one model alone: how they are seen, their softmax, and its gradient.
// Written once for every instruction set, as rows.h is.
//
// What bounds it: an exponential an element; of capped logits two, and a division.
#pragma once

#include <algorithm>
#include <numbers>

#include "softmax_kl/rows.h"

namespace trine {
namespace {

// Calls body(i, count) for whole vectors and for the rest, in order.
template <class V, class Body>
void for_each_place(int64_t n, const Body& body) {
  constexpr std::integral_constant<int, V::width> whole;
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) body(i, whole);
  if (i < n) body(i, static_cast<int>(n - i));
}

// tanh(|u|) and 1 / cosh^2(u), from m = exp(-2 |u|) - 1; NaN stays NaN.
template <class V>
struct Tanh {
  V of_size, slope;

  explicit Tanh(V u) : of_size(0.0f), slope(0.0f) {
    const V bits = V::copy_sign(u * V(float(2 * std::numbers::log2e)), V(-1.0f));
    const Power<V> e = power_of_2(V::max(V(kPowerIsZero), bits));
    const V minus_1 = e.minus_1(), sum = minus_1 + V(2.0f);
    of_size = (V(0.0f) - minus_1) / sum;
    slope = V(4.0f) * e.value() / (sum * sum);
  }
};

template <class V, class T>
void see_part(const T* x, int64_t n, LogitsSeen seen, float* z) {
  const V scale(seen.cap == 0 ? seen.scale : seen.scale / seen.cap), cap(seen.cap);
  for_each_place<V>(n, [&](int64_t i, auto count) {
    V u = V::load(x + i, count) * scale;
    if (seen.cap != 0) u = V::copy_sign(Tanh<V>(u).of_size * cap, u);
    u.store(z + i, count);
  });
}

template <class V, class T>
void see_backward_part(const T* x, int64_t n, LogitsSeen seen, const float* gradient, T* out) {
  const V scale(seen.scale), inner(seen.cap == 0 ? 0.0f : seen.scale / seen.cap);
  for_each_place<V>(n, [&](int64_t i, auto count) {
    V g = V::load(gradient + i, count) * scale;
    if (seen.cap != 0) g = g * Tanh<V>(V::load(x + i, count) * inner).slope;
    g.store(out + i, count);
  });
}

template <class V, class T>
SoftmaxSums sum_softmax_part(const T* z, int64_t n, float rate) {
  SoftmaxSums sums;
  const V infinite(-kInfinity);
  const Exponential<V> exp(rate);
  for (int64_t begin = 0; begin < n; begin += kBlock<V>) {
    const int64_t block = std::min(kBlock<V>, n - begin);
    const T* from = z + begin;
    V max = infinite, sum(0.0f);
    for_each_vector<false, V>(from, from, block, [&](V at, V, auto count) {
      if constexpr (!is_whole<decltype(count)>) at = V::first(count, at, infinite);
      max = V::max(at, max);
    });
    SoftmaxSums of_block{max.reduce_max(), 0};
    raise_maximum(&sums, of_block.max, rate);
    const V origin(sums.max == -kInfinity ? 0.0f : sums.max);
    for_each_vector<true, V>(from, from, block, [&](V at, V, auto count) {
      if constexpr (!is_whole<decltype(count)>) at = V::first(count, at, infinite);
      sum = sum + exp(at - origin);
    });
    sums.sum += sum.reduce_add();
  }
  return sums;
}

template <class V, class T>
WeightedSum sum_weighted_part(const T* z, int64_t n, const float* weight, float origin) {
  WeightedSum sums{0, weight == nullptr ? double(n) : 0.0};
  for (int64_t begin = 0; begin < n; begin += kBlock<V>) {
    V logits(0.0f), weights(0.0f);
    for_each_place<V>(std::min(kBlock<V>, n - begin), [&](int64_t i, auto count) {
      V at = V::load(z + begin + i, count) - V(origin);
      if (weight != nullptr) {
        const V w = V::load(weight + begin + i, count);
        at = at * w;
        weights = weights + w;  // lanes that do not exist read as 0
      }
      if constexpr (!is_whole<decltype(count)>) at = V::first(count, at, V(0.0f));
      logits = logits + at;
    });
    sums.logits += logits.reduce_add();
    sums.weights += weights.reduce_add();
  }
  return sums;
}

template <class V, class T>
void add_softmax_part(const T* z, int64_t n, float rate, float max, float factor,
                      const float* weight, float shift, float* gradient) {
  const Exponential<V> exp(rate);
  const V origin(max), scale(factor), minus_shift(-shift);
  for_each_place<V>(n, [&](int64_t i, auto count) {
    V g = V::mul_add(exp(V::load(z + i, count) - origin), scale, V::load(gradient + i, count));
    g = weight == nullptr ? g + minus_shift
                          : V::mul_add(V::load(weight + i, count), minus_shift, g);
    g.store(gradient + i, count);
  });
}

// A gradient and a cross entropy's, with respect to the same logits.
template <bool for_teacher, class Gradient>
struct WithCrossEntropy {
  using Vector = typename Gradient::Vector;
  Gradient soft;
  Exponential<Vector> exp;
  float max, factor, minus_shift;

  [[gnu::always_inline]] Vector operator()(Vector s, Vector t) const {
    const Vector z = for_teacher ? t : s;
    const Vector sum = Vector::mul_add(exp(z - Vector(max)), Vector(factor), soft(s, t));
    return sum + Vector(minus_shift);
  }
};

template <bool for_teacher, class S, class T, class Gradient, class Out>
void write_gradient(const S* student, const T* teacher, int64_t n, const Gradient& gradient,
                    const CrossEntropyTerm& hard, Out* out) {
  if constexpr (std::is_same_v<S, T> && !std::is_same_v<S, float16>)
    if (hard.factor != 0)
      return gradient_part(student, teacher, n,
                           WithCrossEntropy<for_teacher, Gradient>{
                               gradient, Exponential<typename Gradient::Vector>(kLog2e), hard.max,
                               hard.factor, -hard.shift},
                           out);
  gradient_part(student, teacher, n, gradient, out);
}

// The functions of a kernel file, on its vector type; `Wide` is the one for the divergences with a
// mixture, whose chains are long.
template <class V, class Wide = V>
struct Functions {
  static SoftmaxKlSums forward(LogitRow student, LogitRow teacher, int64_t n, float rate) {
    return with_types(student, teacher,
                      [&](const auto* s, const auto* t) { return forward_part<V>(s, t, n, rate); });
  }
  static SoftmaxKlMaxima maxima(LogitRow student, LogitRow teacher, int64_t n) {
    return with_types(student, teacher,
                      [&](const auto* s, const auto* t) { return maxima_part<true, V>(s, t, n); });
  }
  static SoftmaxKlSums exponentials(LogitRow student, LogitRow teacher, int64_t n, float rate,
                                    SoftmaxKlMaxima maxima, const Kept& kept) {
    if (kept.scratch != nullptr)
      return exponentials_part<Keep::exponentials, V>(floats(student), floats(teacher), n, rate,
                                                      maxima, kept);
    return with_types(student, teacher, [&](const auto* s, const auto* t) {
      return exponentials_part<Keep::nothing, V>(s, t, n, rate, maxima, kept);
    });
  }
  static SoftmaxKlSlopes slopes(LogitRow student, LogitRow teacher, int64_t n, float rate,
                                const SoftmaxKlRow& row, Divergence divergence, const Kept& kept) {
    return with_divergence<Wide>(divergence, [&](const auto& slopes_at) {
      const auto run = [&]<Keep keep, bool of_teacher>(const auto* s, const auto* t) {
        return slopes_part<keep, of_teacher, Wide>(s, t, n, row, rate, slopes_at, kept);
      };
      const auto kept_of = [&]<bool of_teacher>() {
        const float *s = floats(student), *t = floats(teacher);
        return kept.scratch != nullptr
                   ? run.template operator()<Keep::exponentials, of_teacher>(s, t)
                   : run.template operator()<Keep::slopes, of_teacher>(s, t);
      };
      if (kept.gradient != nullptr)
        return kept.of_teacher ? kept_of.template operator()<true>()
                               : kept_of.template operator()<false>();
      return with_types(student, teacher, [&](const auto* s, const auto* t) {
        return run.template operator()<Keep::nothing, false>(s, t);
      });
    });
  }
  static void gradient_of_slopes(const float* logits, int64_t n, float rate,
                                 const SoftmaxKlRow& row, Divergence divergence, float scale,
                                 const CrossEntropyTerm& hard, const Kept& kept) {
    with_divergence<V>(divergence, [&](const auto& slopes_at) {
      const GradientOfSlopes<V> gradient(kept.of_teacher, row, rate, scale, slopes_at);
      if (kept.scratch != nullptr && hard.factor == 0)
        gradient_part(kept.scratch, kept.gradient, n, GradientOfKept<V>{gradient}, kept.gradient);
      else
        write_gradient<false>(logits, kept.gradient, n, gradient, hard, kept.gradient);
    });
  }
  static void student_gradient(LogitRow student, LogitRow teacher, int64_t n, float rate,
                               const SoftmaxKlRow& row, Divergence divergence, float scale,
                               const CrossEntropyTerm& hard, void* out) {
    with_gradient<false, V, Wide>(divergence, row, rate, scale, [&](const auto& gradient) {
      with_types(student, teacher, [&]<class S, class T>(const S* s, const T* t) {
        write_gradient<false>(s, t, n, gradient, hard, static_cast<S*>(out));
      });
    });
  }
  static void teacher_gradient(LogitRow student, LogitRow teacher, int64_t n, float rate,
                               const SoftmaxKlRow& row, Divergence divergence, float scale,
                               const CrossEntropyTerm& hard, void* out) {
    with_gradient<true, V, Wide>(divergence, row, rate, scale, [&](const auto& gradient) {
      with_types(student, teacher, [&]<class S, class T>(const S* s, const T* t) {
        write_gradient<true>(s, t, n, gradient, hard, static_cast<T*>(out));
      });
    });
  }
  static void see(LogitRow x, int64_t n, LogitsSeen seen, float* z) {
    with_type(x, [&](const auto* from) { see_part<V>(from, n, seen, z); });
  }
  static void see_backward(LogitRow x, int64_t n, LogitsSeen seen, const float* gradient,
                           void* out) {
    with_type(x, [&]<class T>(const T* from) {
      see_backward_part<V>(from, n, seen, gradient, static_cast<T*>(out));
    });
  }
  static SoftmaxSums sum_softmax(LogitRow z, int64_t n, float rate) {
    return with_type(z, [&](const auto* from) { return sum_softmax_part<V>(from, n, rate); });
  }
  static WeightedSum sum_weighted(LogitRow z, int64_t n, const float* weight, float origin) {
    return with_type(
        z, [&](const auto* from) { return sum_weighted_part<V>(from, n, weight, origin); });
  }
  static void add_softmax(LogitRow z, int64_t n, float rate, float max, float factor,
                          const float* weight, float shift, float* gradient) {
    with_type(z, [&](const auto* from) {
      add_softmax_part<V>(from, n, rate, max, factor, weight, shift, gradient);
    });
  }

  static constexpr SoftmaxKlFunctions all = {
      forward,          maxima,           exponentials,       slopes,
      student_gradient, teacher_gradient, gradient_of_slopes, see,
      see_backward,     sum_softmax,      sum_weighted,       add_softmax};

 private:
  static const float* floats(LogitRow row) { return static_cast<const float*>(row.data); }
};

}  // namespace
}  // namespace trine
