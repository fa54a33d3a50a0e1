// softmax_kl with a teacher that is known of a row's `count` best classes: these are the bins of
// the divergence, and all other classes are one more, the tail. A row is a block's.
//
// Forward marks the bins' classes in shared memory and sums what is not marked for itself: 1 less
// the sum of the others would cancel. In backward a class of the tail gets its share of the tail's
// gradient, p times the same factor; then the bins are written over it.
#pragma once

#include "softmax_kl/gradient.cuh"

namespace trine {
namespace {

// The least that a teacher's tail is given while some class has no bin: fp32 knows 1 to this.
constexpr float kLeastTail = 0x1p-23f;

// A bit for each class; two words can be read from any of them.
__host__ __device__ inline int words_of_marks(int classes) { return classes / 32 + 2; }
inline int bytes_of_marks(int classes) { return words_of_marks(classes) * 4; }

// A bin: logarithms of both probabilities, to base 2.
struct Bin {
  float log_p, log_q;
};

template <bool kPrecise>
struct TopKRow {
  const SoftmaxKlOnDevice& problem;  // whose `first` is the student
  const LogitsRow student;
  const char* const indices;
  const LogitsRow teacher;

  __device__ __forceinline__ TopKRow(const SoftmaxKlOnDevice& problem,
                                     const LogitsOnDevice& teacher, int64_t row)
      : problem(problem),
        student(problem.first, row),
        indices(static_cast<const char*>(problem.top_k.indices) +
                row * problem.top_k.count * (problem.top_k.wide ? 8 : 4)),
        teacher(teacher, row) {}

  // -1: the slot is not used.
  __device__ __forceinline__ int64_t class_of(int slot) const {
    return problem.top_k.wide ? reinterpret_cast<const int64_t*>(indices)[slot]
                              : reinterpret_cast<const int32_t*>(indices)[slot];
  }
  __device__ __forceinline__ float logit(int j) const {
    float z[1] = {student.at(j)};
    see<true>(problem.first, z);
    return z[0];
  }
  // Calls use(slot, class) for the slots in use of this thread.
  template <class Use>
  __device__ __forceinline__ void for_slots(const Use& use) const {
#pragma unroll 1
    for (int slot = int(threadIdx.x); slot < problem.top_k.count; slot += kThreads)
      if (const int64_t j = class_of(slot); j != -1) use(slot, j);
  }
  __device__ __forceinline__ float log_q(int slot) const { return teacher.at(slot) * kLog2E; }

  // Calls visit(z, j) for all classes of `span`.
  template <class Visit>
  __device__ __forceinline__ void visit(const Span& span, const RowGroup& group,
                                        const Visit& visit) const {
    span.for_chunks<2, Words<kPrecise>>(
        group,
        [&](Words<kPrecise>& words, int j) { load_words(words, student.data, student.type, j); },
        [&](const Words<kPrecise>& words, int j) {
          float z[kChunk];
          widen(words, student.type, z);
          see<true>(problem.first, z);
          visit(z, j);
        });
    span.for_single(group, [&](int j) {
      const float z[1] = {logit(j)};
      visit(z, j);
    });
  }
};

// d D / d (log p of a bin) and what it takes part in; SavedRow::first_mean is the mean.
__device__ __forceinline__ float bin_gradient(const Divergence& divergence, bool reversed,
                                              const Bin& bin, float mean) {
  const float p = exp2f(bin.log_p), q = exp2f(bin.log_q), log2_quotient = bin.log_p - bin.log_q;
  if (divergence.kind == Divergence::kullback_leibler) {
    if (!reversed) return p - q;
    return p > 0 ? p * (log2_quotient - mean) * kLn2 : 0.0f;
  }
  const SlopesOfClass slopes = slopes_of(divergence, reversed ? -log2_quotient : log2_quotient);
  return p > 0 ? p * ((reversed ? slopes.second : slopes.first) - mean) : 0.0f;
}

// Both rows of sums are of the student: of all classes, and of those of the tail.
__device__ __forceinline__ SoftmaxKlOnDevice of_student(const SoftmaxKlOnDevice& problem) {
  SoftmaxKlOnDevice pair = problem;
  pair.first = pair.second = problem.reversed ? problem.second : problem.first;
  pair.reversed = false;
  return pair;
}

template <bool kPrecise>
__global__ void __launch_bounds__(kThreads, kBlocks<true, kPrecise>)
    softmax_kl_top_k_kernel(SoftmaxKlOnDevice problem, float* soft, float* hard, SavedRow* saved) {
  TRINE_DYNAMIC_SHARED(marks_memory);
  uint32_t* const marks = reinterpret_cast<uint32_t*>(marks_memory);
  const int64_t m = blockIdx.x;
  const RowGroup group = {m, int(threadIdx.x), kThreads};
  const SoftmaxKlOnDevice pair = of_student(problem);
  const bool has_labels = pair.hard.labels != nullptr, reversed = problem.reversed;
  if (pair.classes == 0 || !counts(pair, m)) {
    if (group.rank == 0) write_skipped(pair, m, soft, hard, saved);
    return;
  }
  for (int i = group.rank; i < words_of_marks(pair.classes); i += kThreads) marks[i] = 0;
  __syncthreads();

  const TopKRow<kPrecise> row(pair, problem.reversed ? problem.first : problem.second, m);
  bool right = true;  // the indices
  double of_bins = 0, used = 0;
  row.for_slots([&](int slot, int64_t j) {
    right = right && j >= 0 && j < pair.classes;
    if (!right) return;
    atomicOr(marks + j / 32, 1u << j % 32);
    of_bins += exp2f(row.log_q(slot));
    used += 1;
  });
  right = __syncthreads_and(right);  // and the marks are there
  const auto bins = added_up<2>(group, {of_bins, used});

  const float class_0 = has_labels ? row.logit(0) : 0.0f;
  Summing<kPrecise> summing(pair, class_0);
  row.visit(Span(0, pair.classes, row.student), group,
            [&]<int kCount>(const float (&z)[kCount], int j) {
              const uint64_t marked = (uint64_t(marks[j / 32 + 1]) << 32 | marks[j / 32]) >> j % 32;
              float of_tail[kCount];
#pragma unroll
              for (int i = 0; i < kCount; ++i)
                of_tail[i] = uint32_t(marked) >> i & 1 ? kNone : z[i];
              summing.add(z, of_tail, j);
            });
  const Sums<double> sums = combined<kPrecise>(pair, group, summing.sums);
  right = right && sums.first > 0;
  SavedRow result = {sums.first_origin, 0, right ? 1.0f / float(sums.first) : kNaN, 0, 0, 0, 0, 0};
  result.log2_ratio = right ? log2f(float(sums.first)) : kNaN;

  const Base base(sums.first_origin, pair.first.rate);
  const float between = climb<kPrecise>(sums.second_origin, sums.first_origin, base.rate);
  const float rest = fmaxf(float(1 - bins.of[0]), kLeastTail);
  const Bin tail = {
      sums.second > 0 ? log2f(float(sums.second)) - between - result.log2_ratio : kNone,
      bins.of[1] < pair.classes ? log2f(rest) : kNone};
  const bool is_kl = pair.divergence.kind == Divergence::kullback_leibler;
  float divergence = 0, p_slope = 0;
  const auto add = [&](const Bin& bin) {
    const float p = exp2f(bin.log_p), q = exp2f(bin.log_q), quotient = bin.log_p - bin.log_q;
    if (is_kl) {
      if ((reversed ? p : q) > 0) divergence += (reversed ? p : -q) * quotient * kLn2;
      return;
    }
    const SlopesOfClass slopes = slopes_of(pair.divergence, reversed ? -quotient : quotient);
    const float term = p * (reversed ? slopes.second : slopes.first);
    p_slope += term;
    divergence += fmaf(q, reversed ? slopes.first : slopes.second, term);
  };
  if (right)
    row.for_slots([&](int slot, int64_t j) {
      add({bits_of<kPrecise>(row.logit(int(j)), base) - result.log2_ratio, row.log_q(slot)});
    });
  if (group.rank == 0) add(tail);
  const auto totals = added_up<3>(group, {divergence, p_slope, 0});
  if (group.rank != 0) return;
  const float loss = right ? float(totals.of[0]) : kNaN;
  soft[m] = not_negative(loss);
  result.first_mean = is_kl ? loss * kLog2E : float(totals.of[1]);
  // The gradient of a class of the tail, over its p.
  result.second_mean =
      tail.log_p > kPowerIsZero
          ? bin_gradient(pair.divergence, reversed, tail, result.first_mean) * exp2f(-tail.log_p)
          : 0.0f;
  if (has_labels)
    hard[m] = finish_hard<kPrecise>(
        pair, sums, m, summing.class_0, [&](int j) { return row.logit(j); }, &result);
  saved[m] = result;
}

template <bool kPrecise>
__global__ void __launch_bounds__(kThreads, kBlocks<true, kPrecise>)
    softmax_kl_top_k_backward_kernel(SoftmaxKlOnDevice problem, const SavedRow* saved,
                                     GradientOnDevice to) {
  const int parts = parts_of(problem.classes), part = int(blockIdx.x % parts);
  const int64_t m = blockIdx.x / parts;
  const RowGroup group = {m, int(threadIdx.x), kThreads};
  const int begin = part * kPart;
  const bool last = part == parts - 1;
  const int end = last ? problem.classes : begin + kPart;
  const SoftmaxKlOnDevice pair = of_student(problem);
  const LogitsRow out(to.gradient, pair.first.type, m * to.width);
  const Factors factors(pair, pair.first, to, m);
  if (factors.are_zero()) {
    fill_with_zeros(out, group, begin, last ? int(to.width) : end);
    return;
  }
  if (last && to.width > end) fill_with_zeros(out, group, end, int(to.width));

  const SavedRow saved_row = saved[m];
  const int label = factors.hard != 0 ? int(pair.hard.labels[m]) : -1;
  const TopKRow<kPrecise> row(pair, problem.reversed ? problem.first : problem.second, m);
  const Base base(saved_row.first_origin, pair.first.rate);
  const float of_exp = factors.soft * saved_row.first_inverse;
  // Adds the hard term of classes j and following to the soft one, and looks through the cap.
  const auto finish = [&]<int kCount>(const float (&z)[kCount], int j, float (&gradient)[kCount]) {
    const auto own = [&](int i) { return z[i]; };
    if (factors.hard != 0)
      add_hard_gradient<kPrecise>(pair, saved_row, label, factors.hard, own, j, gradient);
    see_through<true>(pair.first, own, gradient);
  };
  row.visit(
      Span(begin, end, row.student, out), group, [&]<int kCount>(const float (&z)[kCount], int j) {
        float gradient[kCount] = {};
        if (factors.soft != 0) {
#pragma unroll
          for (int i = 0; i < kCount; ++i)
            gradient[i] = exponent_of<kPrecise>(z[i], base).power * of_exp * saved_row.second_mean;
        }
        finish(z, j, gradient);
        out.store(j, gradient);
      });
  __syncthreads();  // the bins come over what has been written
  row.for_slots([&](int slot, int64_t j) {
    if (j < begin || j >= end) return;
    const float z[1] = {row.logit(int(j))};
    const Bin bin = {bits_of<kPrecise>(z[0], base) - saved_row.log2_ratio, row.log_q(slot)};
    float gradient[1] = {0};
    if (factors.soft != 0)
      gradient[0] =
          factors.soft * bin_gradient(pair.divergence, problem.reversed, bin, saved_row.first_mean);
    finish(z, int(j), gradient);
    out.store(int(j), gradient);
  });
}

}  // namespace
}  // namespace trine
