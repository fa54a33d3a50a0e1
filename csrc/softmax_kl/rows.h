// softmax_kl of one row, written once for every instruction set.
//
// A kernel file defines `V`, a vector of V::width floats, and instantiates these templates. Static
// for the reason given in float_types.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "softmax_kl/softmax_kl.h"

namespace trine {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Elements that are summed in fp32 before the sums go on in double. 64 additions a lane lose little
// (the terms of a small divergence cancel), what happens once a block costs little beside them, and
// even with 16 lanes the blocks of both rows (8 KB) stay in the L1 cache.
template <class V>
constexpr int64_t kBlock = 64 * V::width;

// exp(x) = 2^i * exp(r) with i = round(x / ln 2) and |r| <= ln(2) / 2.
constexpr float kLog2E = 0x1.715476p+0f;
// ln 2 in two parts. The first has 16 bits, so that i * kLn2High is exact without FMA too.
constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
// Adding 1.5 * 2^23 rounds to an integer, which then lies in the low bits; 127 is the exponent
// bias.
constexpr float kRound = 0x1.8p+23f + 127.0f;
// Here i is -127, the biased exponent 0, and so 2^i becomes 0.
constexpr float kExpIsZero = -88.0f;
// exp gives 0 below it: i is rounded to -127 from here on.
constexpr float kSmallestExponent = -87.6831f;  // -126.5 ln 2
// expm1(r) = r + r^2 * P(r): minimax in the relative error (1.3e-8), computed with Remez'
// algorithm in 40 digits and rounded to fp32.
constexpr float kP0 = 0x1.fffffep-2f, kP1 = 0x1.5554bp-3f, kP2 = 0x1.555674p-5f,
                kP3 = 0x1.122776p-7f, kP4 = 0x1.6bec06p-10f;

// exp(x) as 2^i and expm1(r).
template <class V>
struct Parts {
  V power, expm1;
};

// For x <= 0, or above it by rounding; NaN stays NaN.
template <class V>
Parts<V> reduce(V x) {
  x = V::max(V(kExpIsZero), x);
  const V shifted = V::mul_add(x, V(kLog2E), V(kRound));
  const V i = shifted - V(kRound);
  const V r = V::mul_add(i, V(-kLn2Low), V::mul_add(i, V(-kLn2High), x));
  V p = V::mul_add(V(kP4), r, V(kP3));
  p = V::mul_add(p, r, V(kP2));
  p = V::mul_add(p, r, V(kP1));
  p = V::mul_add(p, r, V(kP0));
  return {V::low_bits_to_exponent(shifted), V::mul_add(p, r * r, r)};
}

template <class V>
V exp(V x) {
  const Parts<V> parts = reduce(x);
  return V::mul_add(parts.power, parts.expm1, parts.power);
}

// Relative to the result for every x: where 2^i is 1 the difference is exactly 0.
template <class V>
V expm1(V x) {
  const Parts<V> parts = reduce(x);
  return V::mul_add(parts.power, parts.expm1, parts.power - V(1.0f));
}

// Calls body(first, count) for whole vectors and then for the rest of fewer than V::width.
template <class V, class Body>
void for_each_vector(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + V::width <= count; i += V::width) body(i, std::integral_constant<int, V::width>());
  if (i < count) body(i, static_cast<int>(count - i));
}

// `count` values from `begin` on as fp32: the row itself, or a copy in `block`.
template <class V>
const float* as_float(LogitRow row, int64_t begin, int64_t count, float* block) {
  const auto widen_into_block = [&](const auto* values) {
    for_each_vector<V>(count,
                       [&](int64_t i, auto n) { V::load(values + i, n).store(block + i, n); });
    return block;
  };
  switch (row.type) {
    case FloatType::bfloat16:
      return widen_into_block(static_cast<const bfloat16*>(row.data) + begin);
    case FloatType::float16:
      return widen_into_block(static_cast<const float16*>(row.data) + begin);
    default:
      return static_cast<const float*>(row.data) + begin;
  }
}

// The sums over the part of a row seen so far, relative to the maxima of that part.
struct RunningSums {
  float max_student = -kInfinity, max_teacher = -kInfinity;
  float impossible_teacher = -kInfinity;  // the largest t_j where s_j is -inf
  double sum_student = 0, sum_teacher = 0;
  double weighted = 0;  // sum of exp(y_j) * (y_j - x_j), x and y being (s - max) / T, (t - max) / T

  // What is subtracted: no maximum yet counts as 0, so that -inf stays -inf.
  float origin_student() const { return max_student == -kInfinity ? 0.0f : max_student; }
  float origin_teacher() const { return max_teacher == -kInfinity ? 0.0f : max_teacher; }

  void raise_maxima(float student, float teacher, double inverse_temperature) {
    if (student <= max_student && teacher <= max_teacher) return;
    const double up_student = step(&max_student, student) * inverse_temperature;
    const double up_teacher = step(&max_teacher, teacher) * inverse_temperature;
    const double shrink = std::exp(-up_teacher);
    sum_student *= std::exp(-up_student);
    weighted = (weighted + sum_teacher * (up_student - up_teacher)) * shrink;
    sum_teacher *= shrink;
  }

  SoftmaxKlRow finish(float inverse_temperature) const {
    const double log_sum_teacher = std::log(sum_teacher);
    const double log_ratio = std::log(sum_student) - log_sum_teacher;
    SoftmaxKlRow row{max_student, max_teacher, float(log_sum_teacher), float(log_ratio), 0};
    if (std::isnan(log_ratio) || max_student == -kInfinity || max_teacher == -kInfinity)
      row.log_ratio = row.kl = std::numeric_limits<float>::quiet_NaN();
    else if ((impossible_teacher - max_teacher) * inverse_temperature > kSmallestExponent)
      row.kl = kInfinity;
    else  // rounding may leave a hair below 0, which a divergence cannot be
      row.kl = std::max(0.0f, float(weighted / sum_teacher + log_ratio));
    return row;
  }

 private:
  // 0 from -inf: nothing has been summed relative to it.
  static double step(float* maximum, float candidate) {
    const float before = *maximum;
    *maximum = std::max(before, candidate);
    return before == -kInfinity ? 0.0 : double(*maximum) - before;
  }
};

template <class V>
void add_block(const float* student, const float* teacher, int64_t count, float inverse_temperature,
               RunningSums* sums) {
  const V infinite(-kInfinity);  // fills up the last vector: it contributes nothing
  V max_student = infinite, max_teacher = infinite, impossible = infinite;
  for_each_vector<V>(count, [&](int64_t i, auto n) {
    const V s = V::load(student + i, n, infinite), t = V::load(teacher + i, n, infinite);
    max_student = V::max(s, max_student);  // in this order NaN is passed over; it shows in the sums
    max_teacher = V::max(t, max_teacher);
    impossible = V::max(V::select(V::greater(s, infinite), infinite, t), impossible);
  });
  sums->raise_maxima(max_student.reduce_max(), max_teacher.reduce_max(), inverse_temperature);
  sums->impossible_teacher = std::max(sums->impossible_teacher, impossible.reduce_max());

  const V origin_s(sums->origin_student()), origin_t(sums->origin_teacher());
  const V inverse(inverse_temperature), zero(0.0f);
  V sum_student = zero, sum_teacher = zero, weighted = zero;
  for_each_vector<V>(count, [&](int64_t i, auto n) {
    const V s = V::load(student + i, n, infinite), t = V::load(teacher + i, n, infinite);
    const V x = (s - origin_s) * inverse, y = (t - origin_t) * inverse;
    const V q = exp(y);
    sum_student = sum_student + exp(x);
    sum_teacher = sum_teacher + q;
    const V term = V::select(V::greater(s, infinite), q * (y - x), zero);
    weighted = weighted + V::select(V::greater(q, zero), term, zero);
  });
  sums->sum_student += sum_student.reduce_add();
  sums->sum_teacher += sum_teacher.reduce_add();
  sums->weighted += weighted.reduce_add();
}

template <class V>
SoftmaxKlRow forward_row(LogitRow student, LogitRow teacher, int64_t n, float inverse_temperature) {
  alignas(64) float student_block[kBlock<V>], teacher_block[kBlock<V>];
  RunningSums sums;
  for (int64_t begin = 0; begin < n; begin += kBlock<V>) {
    const int64_t count = std::min(kBlock<V>, n - begin);
    add_block<V>(as_float<V>(student, begin, count, student_block),
                 as_float<V>(teacher, begin, count, teacher_block), count, inverse_temperature,
                 &sums);
  }
  return sums.finish(inverse_temperature);
}

// d loss / d s, over T: exp(a) - exp(b) = sign(delta) * exp(max(a, b)) * (1 - exp(-|delta|)) with
// delta = a - b, which neither cancels nor multiplies 0 by infinity.
template <class V>
struct StudentGradient {
  V max_student, max_teacher, log_sum_student, log_sum_teacher, log_ratio, inverse, scale;

  StudentGradient(const SoftmaxKlRow& row, float inverse_temperature, float scale)
      : max_student(row.max_student),
        max_teacher(row.max_teacher),
        log_sum_student(row.log_sum_teacher + row.log_ratio),
        log_sum_teacher(row.log_sum_teacher),
        log_ratio(row.log_ratio),
        inverse(inverse_temperature),
        scale(scale) {}

  V operator()(V s, V t) const {
    const V x = s - max_student, y = t - max_teacher, zero(0.0f);
    const V a = V::mul_add(x, inverse, zero - log_sum_student);
    const V b = V::mul_add(y, inverse, zero - log_sum_teacher);
    const V delta = V::mul_add(x - y, inverse, zero - log_ratio);
    const auto student_larger = V::greater(delta, zero);
    const V larger = exp(V::max(a, b));
    const V magnitude = larger * expm1(V::select(student_larger, zero - delta, delta));
    const V difference = V::select(student_larger, zero - magnitude, magnitude);
    return V::select(V::greater(larger, zero), difference, zero) * scale;
  }
};

// d loss / d t, over T.
template <class V>
struct TeacherGradient {
  V max_student, max_teacher, log_sum_teacher, log_ratio, kl, inverse, scale;

  TeacherGradient(const SoftmaxKlRow& row, float inverse_temperature, float scale)
      : max_student(row.max_student),
        max_teacher(row.max_teacher),
        log_sum_teacher(row.log_sum_teacher),
        log_ratio(row.log_ratio),
        kl(row.kl),
        inverse(inverse_temperature),
        scale(scale) {}

  V operator()(V s, V t) const {
    const V x = s - max_student, y = t - max_teacher, zero(0.0f);
    const V q = exp(V::mul_add(y, inverse, zero - log_sum_teacher));
    const V surplus = V::mul_add(y - x, inverse, log_ratio) - kl;
    return V::select(V::greater(q, zero), q * surplus, zero) * scale;
  }
};

template <class V>
void write_block(const float* values, int64_t count, FloatType type, int64_t begin, void* out) {
  const auto narrow_all = [&](auto* to) {
    for_each_vector<V>(count, [&](int64_t i, auto n) { V::load(values + i, n).store(to + i, n); });
  };
  switch (type) {
    case FloatType::bfloat16:
      return narrow_all(static_cast<bfloat16*>(out) + begin);
    case FloatType::float16:
      return narrow_all(static_cast<float16*>(out) + begin);
    default:
      return;  // already written in place
  }
}

template <class V, template <class> class Gradient>
void gradient_row(LogitRow student, LogitRow teacher, int64_t n, float inverse_temperature,
                  const SoftmaxKlRow& row, float scale, FloatType type, void* out) {
  alignas(64) float student_block[kBlock<V>], teacher_block[kBlock<V>], result_block[kBlock<V>];
  // NaN, where the row has no loss, goes with the scale into every element.
  const Gradient<V> gradient(row, inverse_temperature,
                             std::isnan(row.log_ratio) ? row.log_ratio : scale);
  for (int64_t begin = 0; begin < n; begin += kBlock<V>) {
    const int64_t count = std::min(kBlock<V>, n - begin);
    const float* s = as_float<V>(student, begin, count, student_block);
    const float* t = as_float<V>(teacher, begin, count, teacher_block);
    float* result = type == FloatType::float32 ? static_cast<float*>(out) + begin : result_block;
    for_each_vector<V>(count, [&](int64_t i, auto n) {
      gradient(V::load(s + i, n), V::load(t + i, n)).store(result + i, n);
    });
    write_block<V>(result, count, type, begin, out);
  }
}

}  // namespace
}  // namespace trine

// Defines the three functions of a kernel file, e.g. with suffix avx2, on its vector type V.
#define TRINE_SOFTMAX_KL_KERNELS(suffix, V)                                                     \
  void softmax_kl_##suffix(LogitRow student, LogitRow teacher, int64_t n,                       \
                           float inverse_temperature, SoftmaxKlRow* result) {                   \
    *result = forward_row<V>(student, teacher, n, inverse_temperature);                         \
  }                                                                                             \
  void softmax_kl_student_gradient_##suffix(LogitRow student, LogitRow teacher, int64_t n,      \
                                            float inverse_temperature, const SoftmaxKlRow& row, \
                                            float scale, void* gradient) {                      \
    gradient_row<V, StudentGradient>(student, teacher, n, inverse_temperature, row, scale,      \
                                     student.type, gradient);                                   \
  }                                                                                             \
  void softmax_kl_teacher_gradient_##suffix(LogitRow student, LogitRow teacher, int64_t n,      \
                                            float inverse_temperature, const SoftmaxKlRow& row, \
                                            float scale, void* gradient) {                      \
    gradient_row<V, TeacherGradient>(student, teacher, n, inverse_temperature, row, scale,      \
                                     teacher.type, gradient);                                   \
  }
