// softmax_kl for every GPU from sm_80 on. Forward reads both rows once, whatever the options (the
// divergences of slopes twice, for their mean; from the L2 cache where the rows of all blocks fit
// in it); backward reads them again and writes the gradient. Both are bound by memory.
//
// As calculated, none of it measured: on H200 (132 SMs, 1.75 GHz, 4.2 TB/s as copies reach) an SM
// starts 29 instructions a lane in the time that memory takes for a class in bf16 forward (4
// bytes), 43 backward (6 bytes). A plain KL's take 17 and 21, so memory decides. Of exponentials an
// SM does 3.6 in the first time; forward does two, three with labels. In flight are 48 KB an SM
// forward, 32 KB backward; latency times bandwidth is 25 KB. All in all forward and backward move
// 10 bytes a class; where the losses' coefficients are known beforehand, cuda_sm90a.cu moves 6.
// fp32 takes 35 and 45 instructions for twice the bytes; mixtures (JSD, skewed KL) are bound by
// instructions, some 60 in the second look and in backward.
#include "softmax_kl/cuda.h"

#include "common/cuda/launch.cuh"
#include "softmax_kl/gradient.cuh"
#include "softmax_kl/top_k.cuh"
#include "softmax_kl/variants.h"

namespace trine {
namespace {

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
      loss = finish_slopes<kPrecise>(
          problem, [&](const auto& visit) { rows.visit(span, group, visit); },
          [&](const Totals<4>& own) { return added_up(group, own); }, &row);
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

  const Rows<kGeneral, kPrecise> rows(problem, m);
  const Span span(begin, end, rows.first, rows.second, out);
  rows.visit(span, group,
             WriteGradient<kGeneral, kPrecise>(problem, saved[m], factors, of_first, m, out));
}

// Multiplies a row by `factor`; 1 leaves it unread, 0 gives 0 whatever was there.
__global__ void __launch_bounds__(kThreads)
    softmax_kl_scale_kernel(LogitsOnDevice gradient, int width, const float* factor) {
  const float by = *factor;
  if (by == 1) return;
  const RowGroup group = {blockIdx.x, int(threadIdx.x), kThreads};
  const LogitsRow row(gradient, group.row);
  const Span span(0, width, row);
  if (by == 0) return fill_with_zeros(row, group, 0, width);
  span.for_chunks<2, Words<true>>(
      group, [&](Words<true>& words, int j) { load_words(words, row.data, row.type, j); },
      [&](const Words<true>& words, int j) {
        float x[kChunk];
        widen(words, row.type, x);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) x[i] *= by;
        row.store(j, x);
      });
  span.for_single(group, [&](int j) {
    const float x[1] = {row.at(j) * by};
    row.store(j, x);
  });
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

void softmax_kl_with_gradient_cuda(const SoftmaxKlOnDevice& problem, float* soft, float* hard,
                                   SavedRow* saved, const GradientOnDevice& gradient,
                                   cudaStream_t stream) {
  if (compute_capability() == 90 &&
      softmax_kl_one_pass_cuda(problem, soft, hard, saved, gradient, stream))
    return;
  softmax_kl_cuda(problem, soft, hard, saved, stream);
  softmax_kl_backward_cuda(problem, saved, gradient, stream);
}

void softmax_kl_scale_cuda(void* gradient, FloatType type, int64_t rows, int64_t width,
                           const float* factor, cudaStream_t stream) {
  if (rows == 0 || width == 0) return;
  const LogitsOnDevice side = {static_cast<const char*>(gradient), type,
                               width * kFloatBytes[int(type)], 0, 0};
  launch("softmax_kl", softmax_kl_scale_kernel, {rows, kThreads}, stream, side, int(width), factor);
}

}  // namespace trine
