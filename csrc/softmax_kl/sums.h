// What forward knows of a row, or of a part of one: sums relative to the maxima seen so far.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "softmax_kl/softmax_kl.h"

namespace trine {
namespace {

constexpr float kLog2e = float(std::numbers::log2e);
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Exponents of 2 at and below it give 0, for they are rounded to the integer -127.
constexpr double kSmallestExponent = -126.5;

// 0 from -inf: nothing has been summed relative to it.
[[maybe_unused]] inline double raise(float* maximum, float candidate) {
  const float before = *maximum;
  *maximum = std::max(before, candidate);
  return before == -kInfinity ? 0.0 : double(*maximum) - before;
}

[[maybe_unused]] inline void raise_maximum(SoftmaxSums* sums, float candidate, double rate) {
  if (candidate > sums->max) sums->sum *= std::exp2(-raise(&sums->max, candidate) * rate);
}

[[maybe_unused]] inline void merge(SoftmaxSums* sums, SoftmaxSums other, double rate) {
  raise_maximum(sums, other.max, rate);
  raise_maximum(&other, sums->max, rate);
  sums->sum += other.sum;
}

[[maybe_unused]] inline void raise_maxima(SoftmaxKlSums* sums, float student, float teacher,
                                          double rate) {
  if (student <= sums->max_student && teacher <= sums->max_teacher) return;
  const double up_student = raise(&sums->max_student, student);
  const double up_teacher = raise(&sums->max_teacher, teacher);
  const double shrink = std::exp2(-up_teacher * rate);
  sums->student *= std::exp2(-up_student * rate);
  sums->weighted = (sums->weighted + sums->teacher * (up_student - up_teacher)) * shrink;
  sums->teacher *= shrink;
}

[[maybe_unused]] inline void merge(SoftmaxKlSums* sums, SoftmaxKlSums other, double rate) {
  raise_maxima(sums, other.max_student, other.max_teacher, rate);
  raise_maxima(&other, sums->max_student, sums->max_teacher, rate);
  sums->impossible_teacher = std::max(sums->impossible_teacher, other.impossible_teacher);
  sums->student += other.student;
  sums->teacher += other.teacher;
  sums->weighted += other.weighted;
}

[[maybe_unused]] inline void merge(SoftmaxKlMaxima* maxima, SoftmaxKlMaxima other) {
  maxima->student = std::max(maxima->student, other.student);
  maxima->teacher = std::max(maxima->teacher, other.teacher);
}

struct FinishedRow {
  SoftmaxKlRow row;
  float kl;
};

[[maybe_unused]] inline FinishedRow finish(const SoftmaxKlSums& sums, double rate) {
  const double log2_ratio = std::log2(sums.student / sums.teacher);
  const double mean_difference = sums.weighted / sums.teacher;
  const double kl = std::numbers::ln2 * (mean_difference * rate + log2_ratio);
  FinishedRow result{{sums.max_student, sums.max_teacher, float(1 / sums.teacher),
                      float(log2_ratio), 0.0f, float(mean_difference)},
                     std::max(0.0f, float(kl))};  // rounding may leave a hair below 0
  if (std::isnan(log2_ratio) || sums.max_student == -kInfinity || sums.max_teacher == -kInfinity)
    result.row.log2_ratio = result.kl = std::numeric_limits<float>::quiet_NaN();
  else if ((double(sums.impossible_teacher) - sums.max_teacher) * rate > kSmallestExponent)
    result.row.teacher_mean = result.kl = kInfinity;
  return result;
}

[[maybe_unused]] inline void add(SoftmaxKlSlopes* sums, const SoftmaxKlSlopes& other) {
  sums->student += other.student;
  sums->teacher += other.teacher;
}

// Completes the row and returns its divergence.
[[maybe_unused]] inline float finish(const SoftmaxKlSlopes& slopes, const SoftmaxKlSums& sums,
                                     SoftmaxKlRow* row) {
  const double student = slopes.student / sums.student, teacher = slopes.teacher / sums.teacher;
  row->student_mean = float(student);
  row->teacher_mean = float(teacher);
  if (std::isnan(row->log2_ratio)) return row->log2_ratio;
  return std::max(0.0f, float(student + teacher));
}

}  // namespace
}  // namespace trine
