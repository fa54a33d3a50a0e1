// What forward sums over the classes of a row: a thread in fp32, some hundred terms, then the
// threads' sums in double.
#pragma once

#include "common/cuda/reduce.cuh"
#include "softmax_kl/rows.cuh"

namespace trine {
namespace {

// Sums relative to the origins, each the largest of some logits; none: -inf.
template <class Real>
struct Sums {
  float first_origin, second_origin;
  Real first, second;      // of exp
  Real weighted;           // of the second's exp times log2 of the second's over the first's
  Real hard;               // of the student's exp at T = 1
  Real weights, smoothed;  // of the class weights; of those times the logit less that of class 0
};

// In bits, from one origin up to another; from none it is nothing, for nothing has been summed.
template <bool kPrecise>
__device__ __forceinline__ float climb(float before, float after, float rate) {
  if (before == kNone || before == after) return 0.0f;
  return kPrecise ? (after - before) * rate : after * rate - before * rate;  // as exponent_of does
}

template <bool kPrecise, class Real>
__device__ __forceinline__ void move_origins(const SoftmaxKlOnDevice& problem, Sums<Real>& sums,
                                             float first, float second) {
  const auto shrink = [](float bits) { return power_of_2(-bits).value(); };
  const float up_first = climb<kPrecise>(sums.first_origin, first, problem.first.rate);
  const float up_second = climb<kPrecise>(sums.second_origin, second, problem.second.rate);
  const float shrink_second = shrink(up_second);
  sums.first *= shrink(up_first);
  // An infinite term is none any more where its probability turns out to be 0.
  sums.weighted = shrink_second > 0
                      ? (sums.weighted + sums.second * (up_first - up_second)) * shrink_second
                      : 0;
  sums.second *= shrink_second;
  if (problem.hard.labels != nullptr)
    sums.hard *=
        shrink(problem.reversed ? climb<kPrecise>(sums.second_origin, second, problem.hard.rate)
                                : climb<kPrecise>(sums.first_origin, first, problem.hard.rate));
  sums.first_origin = first;
  sums.second_origin = second;
}

struct LargerNumber {  // NaN shows in the sums
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <bool kPrecise, int kLanes>
__device__ __forceinline__ void combine_lanes(const SoftmaxKlOnDevice& problem,
                                              Sums<double>& sums) {
  move_origins<kPrecise>(problem, sums, reduce_lanes<kLanes>(sums.first_origin, LargerNumber{}),
                         reduce_lanes<kLanes>(sums.second_origin, LargerNumber{}));
  sums.first = reduce_lanes<kLanes>(sums.first, Sum{});
  sums.second = reduce_lanes<kLanes>(sums.second, Sum{});
  sums.weighted = reduce_lanes<kLanes>(sums.weighted, Sum{});
  if (problem.hard.labels == nullptr) return;
  sums.hard = reduce_lanes<kLanes>(sums.hard, Sum{});
  sums.weights = reduce_lanes<kLanes>(sums.weights, Sum{});
  sums.smoothed = reduce_lanes<kLanes>(sums.smoothed, Sum{});
}

// Of all threads of a row, for each of them.
template <bool kPrecise>
__device__ __forceinline__ Sums<double> combined(const SoftmaxKlOnDevice& problem,
                                                 const RowGroup& group, const Sums<float>& own) {
  Sums<double> sums = {own.first_origin, own.second_origin, own.first,   own.second,
                       own.weighted,     own.hard,          own.weights, own.smoothed};
  combine_lanes<kPrecise, kWarpThreads>(problem, sums);
  if (group.is_warp()) return sums;
  TRINE_SHARED_ARRAY(Sums<double>, of_warps, kWarps);
  const int lane = int(threadIdx.x) % kWarpThreads;
  if (lane == 0) of_warps[threadIdx.x / kWarpThreads] = sums;
  __syncthreads();
  sums = of_warps[lane % kWarps];
  combine_lanes<kPrecise, kWarps>(problem, sums);
  return sums;
}

// Sums of all threads of a row, for each of them. Another call with as many needs a barrier before.
template <int kCount>
struct Totals {
  double of[kCount];
};

template <int kLanes, int kCount>
__device__ __forceinline__ void add_up_lanes(Totals<kCount>& totals) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) totals.of[i] = reduce_lanes<kLanes>(totals.of[i], Sum{});
}

template <int kCount>
__device__ __forceinline__ Totals<kCount> added_up(const RowGroup& group, Totals<kCount> totals) {
  add_up_lanes<kWarpThreads>(totals);
  if (group.is_warp()) return totals;
  TRINE_SHARED_ARRAY(Totals<kCount>, of_warps, kWarps);
  const int lane = int(threadIdx.x) % kWarpThreads;
  if (lane == 0) of_warps[threadIdx.x / kWarpThreads] = totals;
  __syncthreads();
  totals = of_warps[lane % kWarps];
  add_up_lanes<kWarps>(totals);
  return totals;
}

// A thread's part of the sums.
template <bool kPrecise>
struct Summing {
  // How far, in bits, logits may lie above their origin. Raising it costs more than it gains, as
  // long as nothing overflows; only for the last digits must exp be at most 1.
  static constexpr float kSlack = kPrecise ? 0.0f : 8.0f;

  const SoftmaxKlOnDevice& problem;
  const float class_0;  // logit of the student that differences are taken from
  const float first_slack, second_slack;
  Sums<float> sums;
  Base first, second;

  __device__ __forceinline__ Summing(const SoftmaxKlOnDevice& problem, float class_0)
      : problem(problem),
        class_0(fabsf(class_0) <= kLargest ? class_0 : 0.0f),
        first_slack(slack(problem.first.rate, !problem.reversed)),
        second_slack(slack(problem.second.rate, problem.reversed)),
        sums{kNone, kNone, 0, 0, 0, 0, 0, 0},
        first(kNone, problem.first.rate),
        second(kNone, problem.second.rate) {}

  __device__ __forceinline__ float slack(float rate, bool of_student) const {
    const bool hard = of_student && problem.hard.labels != nullptr;
    return kSlack / (hard ? fmaxf(rate, problem.hard.rate) : rate);
  }

  // Logits of classes j and following.
  template <int kCount>
  __device__ __forceinline__ void add(const float (&a)[kCount], const float (&b)[kCount], int j) {
    float most_a = a[0], most_b = b[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) {
      most_a = fmaxf(most_a, a[i]);
      most_b = fmaxf(most_b, b[i]);
    }
    if (most_a > sums.first_origin + first_slack || most_b > sums.second_origin + second_slack) {
      move_origins<kPrecise>(problem, sums, fmaxf(sums.first_origin, most_a),
                             fmaxf(sums.second_origin, most_b));
      first = Base(sums.first_origin, first.rate);
      second = Base(sums.second_origin, second.rate);
    }
    float of_first = 0, of_second = 0, weighted = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Exponent x = exponent_of<kPrecise>(a[i], first);
      const Exponent y = exponent_of<kPrecise>(b[i], second);
      of_first += x.power;
      of_second += y.power;
      // Not where it is 0: the other factor may be infinite.
      if (y.power > 0)
        weighted = fmaf(-y.power, difference_of<kPrecise>(x, y, first, second), weighted);
    }
    sums.first += of_first;
    sums.second += of_second;
    sums.weighted += weighted;
    if (problem.hard.labels == nullptr) return;
    float z[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) z[i] = problem.reversed ? b[i] : a[i];
    add_hard(z, j);
  }

  template <int kCount>
  __device__ __forceinline__ void add_hard(const float (&z)[kCount], int j) {
    const Base base(problem.reversed ? sums.second_origin : sums.first_origin, problem.hard.rate);
    float total = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) total += exponent_of<kPrecise>(z[i], base).power;
    sums.hard += total;
    if (problem.hard.smoothing > 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float weight = class_weight(problem.hard, j + i);
        sums.weights += weight;
        sums.smoothed = fmaf(weight, z[i] - class_0, sums.smoothed);
      }
    }
  }
};

// log2(a / b), to the last digits also where they are nearly equal.
__device__ __forceinline__ float log2_of_quotient(double a, double b) {
  const float more = float(a - b);
  return (more >= 0 ? log1pf(more / float(b)) : -log1pf(-more / float(a))) * kLog2E;
}

// What the sums tell of a row; the means of other divergences than KL follow.
__device__ __forceinline__ SavedRow row_of(const Sums<double>& sums) {
  SavedRow row = {sums.first_origin, sums.second_origin, 0, 0, 0, 0, 0, 0};
  const bool right = sums.first > 0 && sums.second > 0;  // false for NaN
  row.first_inverse = right ? 1.0f / float(sums.first) : kNaN;
  row.second_inverse = right ? 1.0f / float(sums.second) : kNaN;
  row.log2_ratio = right ? log2_of_quotient(sums.first, sums.second) : kNaN;
  row.second_mean = right ? float(sums.weighted) / float(sums.second) : kNaN;
  return row;
}

// Rounding may leave a hair below 0; NaN stays.
__device__ __forceinline__ float not_negative(float x) { return x < 0 ? 0.0f : x; }

// The cross entropy of row m, and what it leaves to backward. logit(j) is the student's.
template <bool kPrecise, class Logit>
__device__ __forceinline__ float finish_hard(const SoftmaxKlOnDevice& problem,
                                             const Sums<double>& sums, int64_t m, float class_0,
                                             const Logit& logit, SavedRow* row) {
  const LabelsOnDevice& hard = problem.hard;
  const int64_t label = hard.labels[m];
  row->hard_factor = kNaN;
  if (label < 0 || label >= problem.classes) return kNaN;  // nobody waits to raise an error
  const Base base(problem.reversed ? sums.second_origin : sums.first_origin, hard.rate);
  const float log2_sum = log1pf(float(sums.hard - 1)) * kLog2E;  // 1 is in it: that of the origin
  const float of_label = (1 - hard.smoothing) * class_weight(hard, int(label));
  float loss = of_label * (log2_sum - bits_of<kPrecise>(logit(int(label)), base));
  float factor = of_label;
  if (hard.smoothing > 0) {
    const float share = hard.smoothing / float(problem.classes);
    loss += share * float(sums.weights * double(log2_sum - bits_of<kPrecise>(class_0, base)) -
                          sums.smoothed * hard.rate);
    factor += share * float(sums.weights);
  }
  row->hard_factor = factor / float(sums.hard);
  return loss * kLn2;
}

// A row that does not count.
__device__ __forceinline__ void write_skipped(const SoftmaxKlOnDevice& problem, int64_t m,
                                              float* soft, float* hard, SavedRow* saved) {
  soft[m] = 0;
  if (problem.hard.labels != nullptr) hard[m] = 0;
  saved[m] = SavedRow{};
}

}  // namespace
}  // namespace trine
