// softmax_kl for every GPU from sm_80 on. Forward reads both rows once, whatever the options (the
// divergences of slopes twice, for their mean; from the L2 cache where the rows of all blocks fit
// in it); backward reads them again and writes the gradient. Both are bound by memory.
//
// As calculated, none of it measured: on H200 (132 SMs, 1.75 GHz, 4.2 TB/s as copies reach) an SM
// starts 29 instructions a lane in the time that memory takes for a class in bf16 forward (4
// bytes), 43 backward (6 bytes). A plain KL's take 17 and 21, so memory decides. Of exponentials an
// SM does 3.6 in the first time; forward does two, three with labels. In flight are 48 KB an SM
// forward, 32 KB backward; latency times bandwidth is 25 KB. All in all forward and backward move
// 10 bytes a class, 1.67 times what a kernel would that kept the rows on the chip between its two
// passes. fp32 takes 35 and 45 instructions for twice the bytes; mixtures (JSD, skewed KL) are
// bound by instructions, some 60 in the second look and in backward.
#include "softmax_kl/cuda.h"

#include "common/cuda/launch.cuh"
#include "softmax_kl/gradient.cuh"
#include "softmax_kl/top_k.cuh"

namespace trine {
namespace {

// Completes `row` with the means of the slopes, which take a second look at it; returns D.
template <bool kPrecise>
__device__ __forceinline__ float finish_slopes(const Rows<true, kPrecise>& rows, const Span& span,
                                               const RowGroup& group, SavedRow* row) {
  const Divergence divergence = rows.problem.divergence;
  const Probabilities<kPrecise> probabilities(rows.problem, *row, 1.0f);
  float first = 0, second = 0;       // sums of p and q as backward computes them: nearly 1
  float first_slope = 0, total = 0;  // of p * g, of p * g + q * h
  rows.visit(span, group, [&]<int kCount>(const float (&a)[kCount], const float (&b)[kCount], int) {
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
  const auto sums = added_up<4>(group, {first, second, first_slope, total});
  row->first_mean = float(sums.of[2]) / float(sums.of[0]);
  row->second_mean = float(sums.of[3] - sums.of[2]) / float(sums.of[1]);
  return float(sums.of[3]);
}

template <bool kGeneral, bool kPrecise>
__global__ void __launch_bounds__(kThreads, kBlocks<kGeneral, kPrecise>)
    softmax_kl_kernel(SoftmaxKlOnDevice problem, float* soft, float* hard, SavedRow* saved) {
  const RowGroup group = group_of(problem.classes, blockIdx.x);
  const int64_t m = group.row;
  if (m >= problem.rows) return;
  const bool has_labels = problem.hard.labels != nullptr;
  if (problem.classes == 0 || !counts(problem, m)) {
    if (group.rank == 0) write_skipped(problem, m, soft, hard, saved);
    return;
  }
  const Rows<kGeneral, kPrecise> rows(problem, m);
  const Span span(0, problem.classes, rows.first, rows.second);
  const float class_0 = has_labels ? rows.student_at(0) : 0.0f;
  Summing<kPrecise> summing(problem, class_0);
  rows.visit(span, group, [&](const auto& a, const auto& b, int j) { summing.add(a, b, j); });
  const Sums<double> sums = combined<kPrecise>(problem, group, summing.sums);

  SavedRow row = row_of(sums);
  float loss = kLn2 * (row.second_mean + row.log2_ratio);
  if constexpr (kGeneral)
    if (problem.divergence.kind != Divergence::kullback_leibler)
      loss = finish_slopes<kPrecise>(rows, span, group, &row);
  if (group.rank != 0) return;
  soft[m] = not_negative(loss);
  if (has_labels)
    hard[m] = finish_hard<kPrecise>(
        problem, sums, m, summing.class_0, [&](int j) { return rows.student_at(j); }, &row);
  saved[m] = row;
}

template <bool kGeneral, bool kPrecise>
__global__ void __launch_bounds__(kThreads, 2)
    softmax_kl_backward_kernel(SoftmaxKlOnDevice problem, const SavedRow* saved,
                               GradientOnDevice to) {
  const int parts = parts_of(problem.classes);
  const RowGroup group = group_of(problem.classes, blockIdx.x / parts);
  const int64_t m = group.row;
  if (m >= problem.rows) return;
  const int part = int(blockIdx.x % parts), begin = part * kPart;
  const bool last = part == parts - 1;
  const int end = last ? problem.classes : begin + kPart;

  const bool of_first = to.for_teacher == problem.reversed;
  const LogitsOnDevice side = of_first ? problem.first : problem.second;
  const LogitsRow out(to.gradient, side.type, m * to.width);
  const Factors factors(problem, side, to, m);
  if (factors.are_zero()) {
    fill_with_zeros(out, group, begin, last ? int(to.width) : end);
    return;
  }
  if (last && to.width > end) fill_with_zeros(out, group, end, int(to.width));

  const SavedRow row = saved[m];
  const int label = factors.hard != 0 ? int(problem.hard.labels[m]) : -1;
  const Rows<kGeneral, kPrecise> rows(problem, m);
  const Span span(begin, end, rows.first, rows.second, out);
  const Probabilities<kPrecise> probabilities(problem, row, factors.soft);
  rows.visit(span, group,
             [&]<int kCount>(const float (&a)[kCount], const float (&b)[kCount], int j) {
               float gradient[kCount] = {};
               if (factors.soft != 0) {
#pragma unroll
                 for (int i = 0; i < kCount; ++i)
                   gradient[i] = soft_gradient<kGeneral>(problem.divergence, of_first, row,
                                                         probabilities, a[i], b[i]);
               }
               const auto own = [&](int i) { return of_first ? a[i] : b[i]; };
               if (factors.hard != 0)
                 add_hard_gradient<kPrecise>(problem, row, label, factors.hard, own, j, gradient);
               see_through<kGeneral>(side, own, gradient);
               out.store(j, gradient);
             });
}

// Calls run<kGeneral, kPrecise>() for this problem.
template <class Run>
void with_variant(const SoftmaxKlOnDevice& problem, const Run& run) {
  const bool general = problem.divergence.kind != Divergence::kullback_leibler ||
                       problem.first.slope != 0 || problem.second.slope != 0;
  // fp32 logits deserve all digits.
  const auto is_float = [](const LogitsOnDevice& side) { return side.type == FloatType::float32; };
  const bool precise = is_float(problem.first) || is_float(problem.second);
  if (general)
    precise ? run.template operator()<true, true>() : run.template operator()<true, false>();
  else
    precise ? run.template operator()<false, true>() : run.template operator()<false, false>();
}

int64_t blocks_of(const SoftmaxKlOnDevice& problem) {
  if (problem.top_k.given) return problem.rows;
  const int rows = kThreads / threads_of_row(problem.classes);
  return (problem.rows + rows - 1) / rows;
}

}  // namespace

void softmax_kl_cuda(const SoftmaxKlOnDevice& problem, float* soft, float* hard, SavedRow* saved,
                     cudaStream_t stream) {
  if (problem.rows == 0) return;
  const int64_t blocks = blocks_of(problem);
  with_variant(problem, [&]<bool kGeneral, bool kPrecise>() {
    if (problem.top_k.given)
      launch("softmax_kl", softmax_kl_top_k_kernel<kPrecise>,
             {blocks, kThreads, bytes_of_marks(problem.classes)}, stream, problem, soft, hard,
             saved);
    else
      launch("softmax_kl", softmax_kl_kernel<kGeneral, kPrecise>, {blocks, kThreads}, stream,
             problem, soft, hard, saved);
  });
}

void softmax_kl_backward_cuda(const SoftmaxKlOnDevice& problem, const SavedRow* saved,
                              const GradientOnDevice& gradient, cudaStream_t stream) {
  if (problem.rows == 0 || gradient.width == 0) return;
  const int64_t blocks = blocks_of(problem) * parts_of(problem.classes);
  with_variant(problem, [&]<bool kGeneral, bool kPrecise>() {
    if (problem.top_k.given)
      launch("softmax_kl", softmax_kl_top_k_backward_kernel<kPrecise>, {blocks, kThreads}, stream,
             problem, saved, gradient);
    else
      launch("softmax_kl", softmax_kl_backward_kernel<kGeneral, kPrecise>, {blocks, kThreads},
             stream, problem, saved, gradient);
  });
}

}  // namespace trine
