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
#include "softmax_kl/two.h"

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
template <class V>
constexpr bool kIsTwo = false;
template <class V>
constexpr bool kIsTwo<Two<V>> = true;
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
  if constexpr (kEvenOdd<V, S, T> && kIsTwo<V>)
    for (; i + V::width <= count; i += V::width) {
      fetch(i);
      body(V::load_even_odd(student + i), V::load_even_odd(teacher + i), whole);
    }
  else if constexpr (kEvenOdd<V, S, T>)
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

// `ahead`: whether what comes next is fetched.
template <bool ahead, class V, class S, class T>
SoftmaxKlMaxima maxima_part(const S* student, const T* teacher, int64_t n) {
  const V infinite(-kInfinity);
  V max_student = infinite, max_teacher = infinite;
  for_each_vector<ahead, V>(student, teacher, n, [&](V s, V t, auto count) {
    if constexpr (!is_whole<decltype(count)>) {
      s = V::first(count, s, infinite);
      t = V::first(count, t, infinite);
    }
    max_student = V::max(s, max_student);  // in this order NaN is passed over; it shows in the sums
    max_teacher = V::max(t, max_teacher);
  });
  return {max_student.reduce_max(), max_teacher.reduce_max()};
}

template <class V, class S, class T>
SoftmaxKlSums forward_part(const S* student, const T* teacher, int64_t n, float rate) {
  SoftmaxKlSums sums = kEmptySums;
  bool careful = false;
  for (int64_t begin = 0; begin < n; begin += kBlock<V>) {
    const int64_t count = std::min(kBlock<V>, n - begin);
    const S* s = student + begin;
    const T* t = teacher + begin;
    const SoftmaxKlMaxima maxima = maxima_part<false, V>(s, t, count);
    raise_maxima(&sums, maxima.student, maxima.teacher, rate);

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
  using Vector = V;
  Exponential<V> exp;
  float max_student, max_teacher, minus_log2_ratio, student_scale, teacher_scale;

  StudentGradient(const SoftmaxKlRow& row, float rate, float scale)
      : exp(rate),
        max_student(row.max_student),
        max_teacher(row.max_teacher),
        minus_log2_ratio(-row.log2_ratio),
        student_scale(float(-scale * row.inverse_sum_teacher * std::exp2(-double(row.log2_ratio)))),
        teacher_scale(scale * row.inverse_sum_teacher) {}

  [[gnu::always_inline]] V operator()(V s, V t) const {
    const V x = s - V(max_student), y = t - V(max_teacher);
    const V bits = V::mul_add(x - y, V(exp.rate), V(minus_log2_ratio));  // delta / ln 2
    const auto student_larger = V::greater(bits, V(0.0f));
    const V larger = exp(V::select(student_larger, x, y));
    const V scale = V::select(student_larger, V(student_scale), V(teacher_scale));
    // NaN, of two infinities, counts as -inf.
    const V log2 = V::max(V::copy_sign(bits, V(-1.0f)), V(kPowerIsZero));
    return larger * power_of_2(log2).minus_1() * scale;
  }
};

// d loss / d t, over T: exp(b) * (b - a - kl), where the log-sums of b - a and of kl cancel.
template <class V>
struct TeacherGradient {
  using Vector = V;
  Exponential<V> exp;
  float max_student, max_teacher, mean_difference, scale;

  TeacherGradient(const SoftmaxKlRow& row, float rate, float scale)
      : exp(rate),
        max_student(row.max_student),
        max_teacher(row.max_teacher),
        mean_difference(row.teacher_mean),
        scale(float(scale * row.inverse_sum_teacher * (rate * std::numbers::ln2))) {}

  [[gnu::always_inline]] V operator()(V s, V t) const {
    const V x = s - V(max_student), y = t - V(max_teacher), q = exp(y), zero(0.0f);
    const V product = q * ((y - x) - V(mean_difference));
    return V::select(V::greater(q, zero), product, zero) * V(scale);
  }
};

// How the probabilities of classes stand to each other.
template <class V>
struct Quotients {
  float max_student, max_teacher, rate, minus_log2_ratio;

  Quotients(const SoftmaxKlRow& row, float rate)
      : max_student(row.max_student),
        max_teacher(row.max_teacher),
        rate(rate),
        minus_log2_ratio(-row.log2_ratio) {}

  // Of logits relative to their maxima.
  [[gnu::always_inline]] Quotient<V> operator()(V x, V y) const {
    const V zero(0.0f);
    const V bits = V::mul_add(x - y, V(rate), V(minus_log2_ratio));  // log2(p / q); NaN: both 0
    const V log2 = V::max(V::copy_sign(bits, V(-1.0f)), V(kPowerIsZero));
    return {log2, power_of_2(log2), V::greater(bits, zero), V::greater(zero, bits)};
  }
};

// How much is kept of a part; see `Kept`.
enum class Keep { nothing, slopes, exponentials };

template <Keep keep, class V, class S, class T>
SoftmaxKlSums exponentials_part(const S* student, const T* teacher, int64_t n, float rate,
                                SoftmaxKlMaxima maxima, const Kept& kept) {
  const auto origin = [](float max) { return V(max == -kInfinity ? 0.0f : max); };
  const V origin_s = origin(maxima.student), origin_t = origin(maxima.teacher);
  const Exponential<V> exp(rate);
  float* keep_s = kept.of_teacher ? kept.scratch : kept.gradient;
  float* keep_t = kept.of_teacher ? kept.gradient : kept.scratch;
  SoftmaxKlSums sums = kEmptySums;
  sums.max_student = maxima.student;
  sums.max_teacher = maxima.teacher;
  for (int64_t begin = 0; begin < n; begin += kBlock<V>) {
    const int64_t block = std::min(kBlock<V>, n - begin);
    V sum_s(0.0f), sum_t(0.0f);
    for_each_vector<true, V>(student + begin, teacher + begin, block, [&](V s, V t, auto count) {
      if constexpr (!is_whole<decltype(count)>) {
        s = V::first(count, s, V(-kInfinity));
        t = V::first(count, t, V(-kInfinity));
      }
      const V p = exp(s - origin_s), q = exp(t - origin_t);
      sum_s = sum_s + p;
      sum_t = sum_t + q;
      if constexpr (keep == Keep::exponentials) {
        p.store(keep_s, count);
        q.store(keep_t, count);
        keep_s += count;
        keep_t += count;
      }
    });
    sums.student += sum_s.reduce_add();
    sums.teacher += sum_t.reduce_add();
  }
  return sums;
}

// The divergences are homogeneous functions of p and q, and so the sum of p * (slope of p) and of
// q * (slope of q) is the divergence (Euler). `of_teacher` is that of what is kept.
template <Keep keep, bool of_teacher, class V, class OfDivergence, class S, class T>
SoftmaxKlSlopes slopes_part(const S* student, const T* teacher, int64_t n, const SoftmaxKlRow& row,
                            float rate, const OfDivergence slopes_at, Kept kept) {
  const Quotients<V> quotients(row, rate);
  const Exponential<V> exp(rate);
  SoftmaxKlSlopes sums{};
  for (int64_t begin = 0; begin < n; begin += kBlock<V>) {
    const int64_t block = std::min(kBlock<V>, n - begin);
    V sum_s(0.0f), sum_t(0.0f);
    for_each_vector<true, V>(student + begin, teacher + begin, block, [&](V s, V t, auto count) {
      if constexpr (!is_whole<decltype(count)>) {
        s = V::first(count, s, V(-kInfinity));
        t = V::first(count, t, V(-kInfinity));
      }
      const V x = s - V(row.max_student), y = t - V(row.max_teacher);
      const Slopes<V> slopes = slopes_at(quotients(x, y));
      V p(0.0f), q(0.0f);
      if constexpr (keep == Keep::exponentials) {
        const V own = V::load(kept.gradient, count), other = V::load(kept.scratch, count);
        own.store(kept.scratch, count);
        kept.scratch += count;
        p = of_teacher ? other : own;
        q = of_teacher ? own : other;
      } else {
        p = exp(x);
        q = exp(y);
      }
      if constexpr (keep != Keep::nothing) {
        (of_teacher ? slopes.teacher : slopes.student).store(kept.gradient, count);
        kept.gradient += count;
      }
      sum_s = V::mul_add(p, slopes.student, sum_s);
      sum_t = V::mul_add(q, slopes.teacher, sum_t);
    });
    sums.student += sum_s.reduce_add();
    sums.teacher += sum_t.reduce_add();
  }
  sums.student *= slopes_at.student_factor;
  sums.teacher *= slopes_at.teacher_factor;
  return sums;
}

// d loss / d s, over T: p * (slope - sum of p * slope), and likewise for t and q.
template <class V>
struct GradientOfSlopes {
  using Vector = V;
  Exponential<V> exp;
  float max, scale, factor, minus_mean;

  template <class OfDivergence>
  GradientOfSlopes(bool for_teacher, const SoftmaxKlRow& row, float rate, float scale,
                   const OfDivergence& slopes_at)
      : exp(rate),
        max(for_teacher ? row.max_teacher : row.max_student),
        scale(float(scale * row.inverse_sum_teacher *
                    (for_teacher ? 1.0 : std::exp2(-double(row.log2_ratio))))),
        factor(for_teacher ? slopes_at.teacher_factor : slopes_at.student_factor),
        minus_mean(for_teacher ? -row.teacher_mean : -row.student_mean) {}

  [[gnu::always_inline]] V of_exponential(V exponential, V slope) const {
    return exponential * V(scale) * V::mul_add(slope, V(factor), V(minus_mean));
  }
  [[gnu::always_inline]] V operator()(V logits, V slope) const {
    return of_exponential(exp(logits - V(max)), slope);
  }
};

// The same where the exponentials are known.
template <class V>
struct GradientOfKept {
  using Vector = V;
  GradientOfSlopes<V> of_slopes;

  [[gnu::always_inline]] V operator()(V exponential, V slope) const {
    return of_slopes.of_exponential(exponential, slope);
  }
};

template <bool for_teacher, class V, class OfDivergence>
struct SlopeGradient {
  using Vector = V;
  Quotients<V> quotients;
  OfDivergence slopes_at;
  GradientOfSlopes<V> of_slopes;

  SlopeGradient(const SoftmaxKlRow& row, float rate, float scale, const OfDivergence& slopes_at)
      : quotients(row, rate),
        slopes_at(slopes_at),
        of_slopes(for_teacher, row, rate, scale, slopes_at) {}

  [[gnu::always_inline]] V operator()(V s, V t) const {
    const Slopes<V> slopes =
        slopes_at(quotients(s - V(quotients.max_student), t - V(quotients.max_teacher)));
    return of_slopes(for_teacher ? t : s, for_teacher ? slopes.teacher : slopes.student);
  }
};

// Calls body with the gradient of the divergence that is meant.
template <bool for_teacher, class V, class Wide, class Body>
void with_gradient(Divergence divergence, const SoftmaxKlRow& row, float rate, float scale,
                   const Body& body) {
  if (divergence.kind == Divergence::kullback_leibler) {
    using Gradient = std::conditional_t<for_teacher, TeacherGradient<V>, StudentGradient<Wide>>;
    return body(Gradient(row, rate, scale));
  }
  with_divergence<Wide>(divergence, [&]<class OfDivergence>(const OfDivergence& slopes_at) {
    body(SlopeGradient<for_teacher, Wide, OfDivergence>(row, rate, scale, slopes_at));
  });
}

template <class Gradient, class S, class T, class Out>
void gradient_part(
    const S* student, const T* teacher, int64_t n, const Gradient gradient,
    Out* out) {  // by value: what is stored cannot change it, and it stays in registers
  using V = typename Gradient::Vector;
  const auto fetch = [&](int64_t i) __attribute__((always_inline)) {
    prefetch_next_block<V>(student + i);
    prefetch_next_block<V>(teacher + i);
  };
  int64_t i = 0;
  if constexpr (kEvenOdd<V, S, T> && kIsTwo<V>)
    for (; i + V::width <= n; i += V::width) {
      fetch(i);
      gradient(V::load_even_odd(student + i), V::load_even_odd(teacher + i))
          .store_even_odd(out + i);
    }
  else if constexpr (kEvenOdd<V, S, T>)
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
