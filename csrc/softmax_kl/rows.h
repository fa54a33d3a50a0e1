// softmax_kl of one row or a part of it, written once for every instruction set.
//
// A kernel file defines `V`, a vector of V::width floats, and instantiates these templates. Static
// for the reason given in float_types.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <type_traits>
#include <utility>

#include "softmax_kl/divergences.h"
#include "softmax_kl/exponential.h"
#include "softmax_kl/sums.h"

namespace trine {
namespace {

// Elements that are summed in fp32 before the sums go on in double. 64 additions a lane lose little
// (the terms of a small divergence cancel), what happens once a block costs little beside them, and
// even with 16 lanes the blocks of both rows (8 KB) stay in the L1 cache.
template <class V>
constexpr int64_t kBlock = 64 * V::width;

// Fetches what lies one block ahead: the arithmetic of one block and the memory traffic of the
// next then go on at the same time.
template <class V, class T>
[[gnu::always_inline]] inline void prefetch_next_block(const T* here) {
  __builtin_prefetch(reinterpret_cast<const char*>(here) + kBlock<V> * sizeof(T));
}

// Rows of bf16 are taken two vectors at a time, the even elements and the odd ones.
template <class V, class S, class T>
constexpr bool kEvenOdd = V::width > 1 && std::is_same_v<S, bfloat16>&& std::is_same_v<T, bfloat16>;

template <class Count>
constexpr bool is_whole = !std::is_same_v<Count, int>;

// Calls body(s, t, count) for whole vectors and then for the rest of fewer than V::width.
template <bool prefetch, class V, class S, class T, class Body>
void for_each_vector(const S* student, const T* teacher, int64_t count, const Body& body) {
  constexpr std::integral_constant<int, V::width> whole;
  const auto fetch = [&](int64_t i) __attribute__((always_inline)) {
    if constexpr (prefetch) {
      prefetch_next_block<V>(student + i);
      prefetch_next_block<V>(teacher + i);
    }
  };
  int64_t i = 0;
  if constexpr (kEvenOdd<V, S, T>)
    for (; i + 2 * V::width <= count; i += 2 * V::width) {
      const auto [s_even, s_odd] = V::load_even_odd(student + i);
      const auto [t_even, t_odd] = V::load_even_odd(teacher + i);
      fetch(i);
      body(s_even, t_even, whole);
      body(s_odd, t_odd, whole);
    }
  for (; i + V::width <= count; i += V::width) {
    fetch(i);
    body(V::load(student + i, V::width), V::load(teacher + i, V::width), whole);
  }
  if (i < count) {
    const int rest = static_cast<int>(count - i);
    body(V::load(student + i, rest), V::load(teacher + i, rest), rest);
  }
}

template <class V>
struct BlockSums {
  V student = V(0.0f), teacher = V(0.0f), weighted = V(0.0f);
  V impossible_teacher = V(-kInfinity);
};

// `careful` is right for every input. Without it `weighted` is not finite where s_j or t_j is -inf.
template <bool careful, class V, class S, class T>
BlockSums<V> sum_block(const S* student, const T* teacher, int64_t count, float rate,
                       const SoftmaxKlSums& so_far) {
  // What is subtracted: no maximum yet counts as 0, so that -inf stays -inf.
  const auto origin = [](float max) { return V(max == -kInfinity ? 0.0f : max); };
  const V origin_s = origin(so_far.max_student), origin_t = origin(so_far.max_teacher);
  const V infinite(-kInfinity), zero(0.0f);
  const Exponential<V> exp(rate);
  BlockSums<V> sums;
  for_each_vector<true, V>(student, teacher, count, [&](V s, V t, auto n) {
    if constexpr (!is_whole<decltype(n)>) {
      s = V::first(n, s, infinite);
      t = V::first(n, t, infinite);
    }
    const V x = s - origin_s, y = t - origin_t, q = exp(y);
    sums.student = sums.student + exp(x);
    sums.teacher = sums.teacher + q;
    if constexpr (careful || !is_whole<decltype(n)>) {
      const auto possible = V::greater(s, infinite);
      const V term = V::select(possible, q * (y - x), zero);
      sums.weighted = sums.weighted + V::select(V::greater(q, zero), term, zero);
      sums.impossible_teacher = V::max(V::select(possible, infinite, t), sums.impossible_teacher);
    } else {
      sums.weighted = V::mul_add(q, y - x, sums.weighted);
    }
  });
  return sums;
}

template <class V, class S, class T>
SoftmaxKlSums forward_part(const S* student, const T* teacher, int64_t n, float rate) {
  SoftmaxKlSums sums = kEmptySums;
  bool careful = false;
  for (int64_t begin = 0; begin < n; begin += kBlock<V>) {
    const int64_t count = std::min(kBlock<V>, n - begin);
    const S* s = student + begin;
    const T* t = teacher + begin;
    const V infinite(-kInfinity);
    V max_student = infinite, max_teacher = infinite;
    for_each_vector<false, V>(s, t, count, [&](V at_s, V at_t, auto n) {
      if constexpr (!is_whole<decltype(n)>) {
        at_s = V::first(n, at_s, infinite);
        at_t = V::first(n, at_t, infinite);
      }
      max_student = V::max(at_s, max_student);  // in this order NaN is passed over; it shows in
      max_teacher = V::max(at_t, max_teacher);  // the sums
    });
    raise_maxima(&sums, max_student.reduce_max(), max_teacher.reduce_max(), rate);

    const auto add = [&](const BlockSums<V>& block) {
      sums.impossible_teacher =
          std::max(sums.impossible_teacher, block.impossible_teacher.reduce_max());
      sums.student += block.student.reduce_add();
      sums.teacher += block.teacher.reduce_add();
      sums.weighted += block.weighted.reduce_add();
    };
    if (!careful) {
      const BlockSums<V> block = sum_block<false, V>(s, t, count, rate, sums);
      careful = !std::isfinite(block.weighted.reduce_add());
      if (!careful) add(block);
    }
    // From the first infinite logit on, for a row that has one mostly has more.
    if (careful) add(sum_block<true, V>(s, t, count, rate, sums));
  }
  return sums;
}

// d loss / d s, over T: exp(a) - exp(b) = sign(delta) * exp(max(a, b)) * (1 - exp(-|delta|)) with
// delta = a - b, which neither cancels nor multiplies 0 by infinity.
template <class V>
struct StudentGradient {
  Exponential<V> exp;
  V max_student, max_teacher, log2_ratio, student_scale, teacher_scale;

  StudentGradient(const SoftmaxKlRow& row, float rate, float scale)
      : exp(rate),
        max_student(row.max_student),
        max_teacher(row.max_teacher),
        log2_ratio(row.log2_ratio),
        student_scale(float(-scale * row.inverse_sum_teacher * std::exp2(-double(row.log2_ratio)))),
        teacher_scale(scale * row.inverse_sum_teacher) {}

  [[gnu::always_inline]] V operator()(V s, V t) const {
    const V x = s - max_student, y = t - max_teacher;
    const V bits = V::mul_add(x - y, exp.rate, V(0.0f) - log2_ratio);  // delta / ln 2
    const auto student_larger = V::greater(bits, V(0.0f));
    const V larger = exp(V::select(student_larger, x, y));
    const V scale = V::select(student_larger, student_scale, teacher_scale);
    return larger * power_of_2(V::copy_sign(bits, V(-1.0f))).minus_1() * scale;
  }
};

// d loss / d t, over T: exp(b) * (b - a - kl), where the log-sums of b - a and of kl cancel.
template <class V>
struct TeacherGradient {
  Exponential<V> exp;
  V max_student, max_teacher, mean_difference, scale;

  TeacherGradient(const SoftmaxKlRow& row, float rate, float scale)
      : exp(rate),
        max_student(row.max_student),
        max_teacher(row.max_teacher),
        mean_difference(row.teacher_mean),
        scale(float(scale * row.inverse_sum_teacher * (rate * std::numbers::ln2))) {}

  [[gnu::always_inline]] V operator()(V s, V t) const {
    const V x = s - max_student, y = t - max_teacher, q = exp(y), zero(0.0f);
    return V::select(V::greater(q, zero), q * ((y - x) - mean_difference), zero) * scale;
  }
};

// Both probabilities of classes, times `scale`, from the larger of them and their quotient.
template <class V>
struct Probabilities {
  Exponential<V> exp;
  V max_student, max_teacher, log2_ratio, student_scale, teacher_scale;

  Probabilities(const SoftmaxKlRow& row, float rate, float scale)
      : exp(rate),
        max_student(row.max_student),
        max_teacher(row.max_teacher),
        log2_ratio(row.log2_ratio),
        student_scale(float(scale * row.inverse_sum_teacher * std::exp2(-double(row.log2_ratio)))),
        teacher_scale(scale * row.inverse_sum_teacher) {}

  [[gnu::always_inline]] Classes<V> operator()(V s, V t) const {
    const V x = s - max_student, y = t - max_teacher, zero(0.0f);
    const V bits = V::mul_add(x - y, exp.rate, zero - log2_ratio);  // log2(p / q); NaN: both 0
    const auto p_larger = V::greater(bits, zero);
    const V larger =
        exp(V::select(p_larger, x, y)) * V::select(p_larger, student_scale, teacher_scale);
    const V quotient = V::max(V::copy_sign(bits, V(-1.0f)), V(kPowerIsZero));
    const Power<V> power = power_of_2(quotient);
    const V smaller = larger * power.value();  // not larger * (1 + e), which cancels
    return {V::select(p_larger, larger, smaller),
            V::select(p_larger, smaller, larger),
            quotient,
            power.minus_1(),
            p_larger,
            V::greater(zero, bits)};
  }
};

// sum of p * (slope of p) and of q * (slope of q); the divergences are homogeneous functions of p
// and q, and so their sum is the divergence (Euler). No term of it is negative.
template <class V, class OfDivergence, class S, class T>
SoftmaxKlSlopes slopes_part(const S* student, const T* teacher, int64_t n,
                            const Probabilities<V> probabilities, const OfDivergence slopes_at) {
  SoftmaxKlSlopes sums{};
  for (int64_t begin = 0; begin < n; begin += kBlock<V>) {
    const int64_t block = std::min(kBlock<V>, n - begin);
    V p(0.0f), q(0.0f), student_slope(0.0f), divergence(0.0f);
    for_each_vector<true, V>(student + begin, teacher + begin, block, [&](V s, V t, auto n) {
      if constexpr (!is_whole<decltype(n)>) {
        s = V::first(n, s, V(-kInfinity));
        t = V::first(n, t, V(-kInfinity));
      }
      const Classes<V> classes = probabilities(s, t);
      const Slopes<V> slopes = slopes_at(classes);
      const V term = classes.p * slopes.student;
      p = p + classes.p;
      q = q + classes.q;
      student_slope = student_slope + term;
      divergence = divergence + V::mul_add(classes.q, slopes.teacher, term);
    });
    sums.student += p.reduce_add();
    sums.teacher += q.reduce_add();
    sums.student_slope += student_slope.reduce_add();
    sums.divergence += divergence.reduce_add();
  }
  return sums;
}

// d loss / d s, over T: p * (slope - sum of p * slope), and likewise for t and q.
template <bool for_teacher, class V, class OfDivergence>
struct SlopeGradient {
  Probabilities<V> probabilities;
  OfDivergence slopes_at;
  V mean;

  [[gnu::always_inline]] V operator()(V s, V t) const {
    const Classes<V> classes = probabilities(s, t);
    const Slopes<V> slopes = slopes_at(classes);
    if constexpr (for_teacher) return classes.q * (slopes.teacher - mean);
    return classes.p * (slopes.student - mean);
  }
};

// Calls body with the gradient of the divergence that is meant.
template <bool for_teacher, class V, class Body>
void with_gradient(Divergence divergence, const SoftmaxKlRow& row, float rate, float scale,
                   const Body& body) {
  if (divergence.kind == Divergence::kullback_leibler) {
    using Gradient = std::conditional_t<for_teacher, TeacherGradient<V>, StudentGradient<V>>;
    return body(Gradient(row, rate, scale));
  }
  with_divergence<V>(divergence, [&]<class OfDivergence>(const OfDivergence& slopes_at) {
    body(SlopeGradient<for_teacher, V, OfDivergence>{
        Probabilities<V>(row, rate, scale), slopes_at,
        V(for_teacher ? row.teacher_mean : row.student_mean)});
  });
}

template <class V, class Gradient, class S, class T, class Out>
void gradient_part(
    const S* student, const T* teacher, int64_t n, const Gradient gradient,
    Out* out) {  // by value: what is stored cannot change it, and it stays in registers
  const auto fetch = [&](int64_t i) __attribute__((always_inline)) {
    prefetch_next_block<V>(student + i);
    prefetch_next_block<V>(teacher + i);
  };
  int64_t i = 0;
  if constexpr (kEvenOdd<V, S, T>)
    for (; i + 2 * V::width <= n; i += 2 * V::width) {
      const auto [s_even, s_odd] = V::load_even_odd(student + i);
      const auto [t_even, t_odd] = V::load_even_odd(teacher + i);
      fetch(i);
      V::store_even_odd(gradient(s_even, t_even), gradient(s_odd, t_odd), out + i);
    }
  for (; i + V::width <= n; i += V::width) {
    fetch(i);
    gradient(V::load(student + i, V::width), V::load(teacher + i, V::width))
        .store(out + i, V::width);
  }
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    gradient(V::load(student + i, rest), V::load(teacher + i, rest)).store(out + i, rest);
  }
}

// Calls body with a pointer to the elements in their type.
template <class Body>
auto with_type(LogitRow row, const Body& body) {
  switch (row.type) {
    case FloatType::bfloat16:
      return body(static_cast<const bfloat16*>(row.data));
    case FloatType::float16:
      return body(static_cast<const float16*>(row.data));
    default:
      return body(static_cast<const float*>(row.data));
  }
}

template <class Body>
auto with_types(LogitRow student, LogitRow teacher, const Body& body) {
  return with_type(student, [&](const auto* s) {
    return with_type(teacher, [&](const auto* t) { return body(s, t); });
  });
}

}  // namespace
}  // namespace trine
