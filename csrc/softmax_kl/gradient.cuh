// What backward does with a class, and which part of a row is a block's.
#pragma once

#include "softmax_kl/sums.cuh"

namespace trine {
namespace {

// Both probabilities of classes and what follows from them; `factor` is a factor of both.
template <bool kPrecise>
struct Probabilities {
  const Base first, second;
  const float first_scale, second_scale, log2_ratio;

  __device__ __forceinline__ Probabilities(const SoftmaxKlOnDevice& problem, const SavedRow& row,
                                           float factor)
      : first(row.first_origin, problem.first.rate),
        second(row.second_origin, problem.second.rate),
        first_scale(factor * row.first_inverse),
        second_scale(factor * row.second_inverse),
        log2_ratio(row.log2_ratio) {}

  // Calls use(p, q, log2(p / q)).
  template <class Use>
  __device__ __forceinline__ auto operator()(float a, float b, const Use& use) const {
    const Exponent x = exponent_of<kPrecise>(a, first), y = exponent_of<kPrecise>(b, second);
    return use(x.power * first_scale, y.power * second_scale,
               difference_of<kPrecise>(x, y, first, second) - log2_ratio);
  }
};

// Classes that a block of backward works on: few rows, too, then fill a GPU.
constexpr int kPart = 16384;
static_assert(kPart >= kMostClassesOfWarp);

__host__ __device__ inline int parts_of(int classes) {
  return classes == 0 ? 1 : (classes + kPart - 1) / kPart;
}

// Zeros to columns `begin` to `end` of a row.
__device__ __forceinline__ void fill_with_zeros(const LogitsRow& to, const RowGroup& group,
                                                int begin, int end) {
  const Span span(begin, end, to);
  struct Nothing {};
  span.for_chunks<1, Nothing>(
      group, [](Nothing&, int) {},
      [&](const Nothing&, int j) {
        const float zeros[kChunk] = {};
        to.store(j, zeros);
      });
  span.for_single(group, [&](int j) {
    const float zero[1] = {};
    to.store(j, zero);
  });
}

// d D / d z of a class, times the factor of `probabilities`.
template <bool kGeneral, bool kPrecise>
__device__ __forceinline__ float soft_gradient(const Divergence& divergence, bool of_first,
                                               const SavedRow& row,
                                               const Probabilities<kPrecise>& probabilities,
                                               float a, float b) {
  return probabilities(a, b, [&](float p, float q, float log2_quotient) {
    if (!kGeneral || divergence.kind == Divergence::kullback_leibler) {
      if (of_first) return gap<kPrecise>(p, q, log2_quotient);
      // q * (log q - log p - D), where the log-sums cancel.
      const float more = -(log2_quotient + row.log2_ratio) - row.second_mean;
      return q != 0 ? q * (more * kLn2) : q;
    }
    const SlopesOfClass slopes = slopes_of(divergence, log2_quotient);
    return of_first ? p * (slopes.first - row.first_mean) : q * (slopes.second - row.second_mean);
  });
}

// Adds d H / d z of classes j and following, times `factor`; z(i) is the logit of class j + i.
template <bool kPrecise, int kCount, class Logit>
__device__ __forceinline__ void add_hard_gradient(const SoftmaxKlOnDevice& problem,
                                                  const SavedRow& row, int label, float factor,
                                                  const Logit& z, int j,
                                                  float (&gradient)[kCount]) {
  const LabelsOnDevice& hard = problem.hard;
  const Base base(problem.reversed ? row.second_origin : row.first_origin, hard.rate);
  const float of_exp = factor * row.hard_factor;
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    gradient[i] = fmaf(exponent_of<kPrecise>(z(i), base).power, of_exp, gradient[i]);
  if (hard.smoothing > 0) {
    const float share = factor * hard.smoothing / float(problem.classes);
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      gradient[i] = fmaf(-share, class_weight(hard, j + i), gradient[i]);
  }
  if (label < j || label >= j + kCount) return;
  const float of_label = factor * (1 - hard.smoothing) * class_weight(hard, label);
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (label == j + i) gradient[i] -= of_label;
}

// Through the cap: d tanh / d x.
template <bool kGeneral, int kCount, class Logit>
__device__ __forceinline__ void see_through(const LogitsOnDevice& side, const Logit& z,
                                            float (&gradient)[kCount]) {
  if constexpr (kGeneral)
    if (side.slope != 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) gradient[i] *= fmaf(-z(i), z(i), 1.0f);
    }
}

// What both terms of row m are multiplied by in the gradient of `side`, but for the cap's part.
struct Factors {
  float soft, hard;

  __device__ __forceinline__ Factors(const SoftmaxKlOnDevice& problem, const LogitsOnDevice& side,
                                     const GradientOnDevice& to, int64_t m) {
    const bool row_counts = counts(problem, m);
    const bool has_hard = problem.hard.labels != nullptr && !to.for_teacher;
    const float seen = side.slope != 0 ? side.slope * kLn2 : kLn2;  // the rates are in bits
    soft = row_counts ? to.grad_soft[m] * (side.rate * seen) : 0.0f;
    hard = row_counts && has_hard ? to.grad_hard[m] * (problem.hard.rate * seen) : 0.0f;
  }
  __device__ __forceinline__ bool are_zero() const { return soft == 0 && hard == 0; }
};

// Completes `row` with the means of the slopes, which take a second look at it; returns D.
// visit_all(visit) shows all classes, add_up(Totals<4>) adds over who shares the row.
template <bool kPrecise, class VisitAll, class AddUp>
__device__ __forceinline__ float finish_slopes(const SoftmaxKlOnDevice& problem,
                                               const VisitAll& visit_all, const AddUp& add_up,
                                               SavedRow* row) {
  const Divergence divergence = problem.divergence;
  const Probabilities<kPrecise> probabilities(problem, *row, 1.0f);
  float first = 0, second = 0;       // sums of p and q as backward computes them: nearly 1
  float first_slope = 0, total = 0;  // of p * g, of p * g + q * h
  visit_all([&]<int kCount>(const float (&a)[kCount], const float (&b)[kCount], int) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      probabilities(a[i], b[i], [&](float p, float q, float log2_quotient) {
        const SlopesOfClass slopes = slopes_of(divergence, log2_quotient);
        const float term = p * slopes.first;
        first += p;
        second += q;
        first_slope += term;
        total += fmaf(q, slopes.second, term);
      });
  });
  const Totals<4> sums = add_up(Totals<4>{first, second, first_slope, total});
  row->first_mean = float(sums.of[2]) / float(sums.of[0]);
  row->second_mean = float(sums.of[3] - sums.of[2]) / float(sums.of[1]);
  return float(sums.of[3]);
}

// Writes the gradient of classes that it is shown.
template <bool kGeneral, bool kPrecise>
struct WriteGradient {
  const SoftmaxKlOnDevice& problem;
  const SavedRow row;
  const Factors factors;
  const bool of_first;  // side
  const int label;
  const LogitsRow to;
  const Probabilities<kPrecise> probabilities;

  __device__ __forceinline__ WriteGradient(const SoftmaxKlOnDevice& problem, const SavedRow& row,
                                           const Factors& factors, bool of_first, int64_t m,
                                           const LogitsRow& to)
      : problem(problem),
        row(row),
        factors(factors),
        of_first(of_first),
        label(factors.hard != 0 ? int(problem.hard.labels[m]) : -1),
        to(to),
        probabilities(problem, row, factors.soft) {}

  template <int kCount>
  __device__ __forceinline__ void operator()(const float (&a)[kCount], const float (&b)[kCount],
                                             int j) const {
    float gradient[kCount] = {};
    if (factors.soft != 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        gradient[i] =
            soft_gradient<kGeneral>(problem.divergence, of_first, row, probabilities, a[i], b[i]);
    }
    const auto own = [&](int i) { return of_first ? a[i] : b[i]; };
    if (factors.hard != 0)
      add_hard_gradient<kPrecise>(problem, row, label, factors.hard, own, j, gradient);
    see_through<kGeneral>(of_first ? problem.first : problem.second, own, gradient);
    to.store(j, gradient);
  }
};

}  // namespace
}  // namespace trine
