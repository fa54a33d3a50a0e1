#include <cstring>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/dispatch.h"
#include "softmax_kl/worker.h"

namespace trine {
namespace {

struct Kernel {
  Isa needs;
  const SoftmaxKlFunctions* functions;
};
constexpr Kernel kKernels[] = {
#if defined(TRINE_X86)
    {Isa::avx512, &kSoftmaxKlAvx512},
    {Isa::avx2, &kSoftmaxKlAvx2},
#elif defined(TRINE_ARM64)
    {Isa::neon, &kSoftmaxKlNeon},
#endif
    {Isa::scalar, &kSoftmaxKlScalar},
};
[[maybe_unused]] const bool announced = announce(kOp, kKernels);

// Rows for each thread from which on a row is one thread's business.
constexpr int64_t kRowsAThread = 8;

// Parts that are worth a thread: 10 us or so.
int64_t grain(const Problem& problem) {
  constexpr int64_t kElements = 1 << 14;
  return std::max<int64_t>(1, kElements / problem.classes);
}

// Calls run(worker, i, part) for part i of those of all rows that count.
template <class Run>
void for_each_part(const Problem& problem, const SoftmaxKlFunctions& kernel, const Run& run) {
  if (problem.classes == 0) return;
  const int64_t parts = problem.parts();
  torch::stable::parallel_for(0, problem.rows() * parts, grain(problem),
                              [&](int64_t first, int64_t last) {
                                const Worker worker(problem, kernel);
                                for (int64_t i = first; i < last; ++i)
                                  if (!problem.skips(i / parts))
                                    run(worker, i, problem.part(i / parts, i % parts));
                              });
}

// A large tensor is fresh memory every time, and its page faults cost several times the arithmetic:
// filling 131 MB took 70 ms in pages of 4 KB and 13 in pages of 2 MB.
void advise_huge_pages([[maybe_unused]] char* memory, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 1 << 21;
  constexpr int64_t kWorthACall = 4 << 20;
  if (bytes < kWorthACall) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), end = begin + uintptr_t(bytes);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  // Advice only: where it is refused everything still works.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

Results forward(const Arguments& arguments) {
  const Problem problem = read_checked(arguments);
  const SoftmaxKlFunctions& kernel = *select(kKernels).functions;
  const int64_t m = problem.rows(), parts = problem.parts();
  Tensor soft = new_tensor(arguments.student, {m}, ScalarType::Float);
  Tensor hard = new_tensor(arguments.student, {problem.labels ? m : 0}, ScalarType::Float);
  Tensor saved = new_tensor(arguments.student, {m, kSavedColumns}, ScalarType::Float);
  auto* softs = static_cast<float*>(soft.mutable_data_ptr());
  auto* hards = static_cast<float*>(hard.mutable_data_ptr());
  auto* rows = static_cast<Saved*>(saved.mutable_data_ptr());
  // Stays where rows are skipped or empty.
  std::fill(rows, rows + m, Saved{});
  std::fill(softs, softs + m, 0.0f);
  std::fill(hards, hards + (problem.labels ? m : 0), 0.0f);
  if (parts == 0) return {soft, hard, saved};

  const bool again = problem.divergence.kind != Divergence::kullback_leibler && !problem.slots;
  const auto finish_first = [&](const Worker& worker, int64_t i, const PartSums& row) {
    if (problem.labels) hards[i] = worker.hard(i, row, &rows[i]);
    softs[i] = worker.soft(i, row, &rows[i]);
  };
  if (m >= kRowsAThread * int64_t(torch::stable::get_num_threads())) {
    // A second pass over a row then reads from L2 what the first one has left there.
    const int64_t rows_worth_a_thread = std::max<int64_t>(1, grain(problem) / parts);
    torch::stable::parallel_for(0, m, rows_worth_a_thread, [&](int64_t first, int64_t last) {
      const Worker worker(problem, kernel);
      for (int64_t i = first; i < last; ++i) {
        if (problem.skips(i)) continue;
        PartSums sums = worker.forward(problem.part(i, 0));
        for (int64_t j = 1; j < parts; ++j)
          merge(&sums, worker.forward(problem.part(i, j)), problem);
        finish_first(worker, i, sums);
        if (!again) continue;
        SoftmaxKlSlopes slopes{};
        for (int64_t j = 0; j < parts; ++j)
          add(&slopes, worker.slopes(problem.part(i, j), rows[i].soft));
        softs[i] = finish(slopes, &rows[i].soft);
      }
    });
    return {soft, hard, saved};
  }

  // Few rows: all threads share each. The sums of parts are added up in the same order.
  const Scratch of_parts(m * parts * int64_t(sizeof(PartSums)));
  const Scratch slopes_of_parts((again ? m * parts : 0) * int64_t(sizeof(SoftmaxKlSlopes)));
  auto* sums = of_parts.data<PartSums>();
  auto* slopes = slopes_of_parts.data<SoftmaxKlSlopes>();
  for_each_part(problem, kernel, [&](const Worker& worker, int64_t i, const Part& part) {
    sums[i] = worker.forward(part);
  });
  const Worker worker(problem, kernel);
  for (int64_t i = 0; i < m; ++i) {
    if (problem.skips(i)) continue;
    for (int64_t j = 1; j < parts; ++j) merge(&sums[i * parts], sums[i * parts + j], problem);
    finish_first(worker, i, sums[i * parts]);
  }
  if (!again) return {soft, hard, saved};
  for_each_part(problem, kernel, [&](const Worker& worker, int64_t i, const Part& part) {
    slopes[i] = worker.slopes(part, rows[part.row].soft);
  });
  for (int64_t i = 0; i < m; ++i) {
    if (problem.skips(i)) continue;
    SoftmaxKlSlopes of_row{};
    for (int64_t j = 0; j < parts; ++j) add(&of_row, slopes[i * parts + j]);
    softs[i] = finish(of_row, &rows[i].soft);
  }
  return {soft, hard, saved};
}

Tensor backward(const Tensor& grad_soft, const Tensor& grad_hard, const Arguments& arguments,
                const Tensor& saved, bool for_teacher) {
  const Problem problem = read_checked(arguments);
  check(!(for_teacher && problem.slots), kOp,
        ": a teacher known by some classes alone gets no gradient");
  const SoftmaxKlFunctions& kernel = *select(kKernels).functions;
  const int64_t m = problem.rows();
  const Tensor of_soft = gradient_of_rows(grad_soft, m, "the soft loss's gradient");
  const Tensor of_hard =
      gradient_of_rows(grad_hard, problem.labels ? m : 0, "the cross entropy's gradient");
  check(saved.scalar_type() == ScalarType::Float && saved.dim() == 2 && saved.size(0) == m &&
            saved.size(1) == kSavedColumns && saved.is_contiguous(),
        kOp, ": the saved rows must be as the forward op returned them");
  const auto* softs = static_cast<const float*>(of_soft.const_data_ptr());
  const auto* hards = static_cast<const float*>(of_hard.const_data_ptr());
  const auto* rows = static_cast<const Saved*>(saved.const_data_ptr());
  double sum_of_weights = 0;
  for (int64_t j = 0; problem.labels && j < problem.classes; ++j)
    sum_of_weights += problem.weight(j);

  const Tensor& logits = for_teacher ? arguments.teacher : arguments.student;
  const Matrix& matrix = (for_teacher ? problem.teacher : problem.student).rows;
  Tensor gradient =
      new_tensor(logits, std::vector<int64_t>(logits.sizes().begin(), logits.sizes().end()));
  auto* out = static_cast<char*>(gradient.mutable_data_ptr());
  const int64_t element = bytes_of(matrix.type), row_bytes = matrix.k * element;
  advise_huge_pages(out, m * row_bytes);
  for (int64_t i = 0; i < m; ++i) {
    const int64_t written = problem.skips(i) ? 0 : problem.classes * element;
    std::memset(out + i * row_bytes + written, 0, static_cast<std::size_t>(row_bytes - written));
  }
  for_each_part(problem, kernel, [&](const Worker& worker, int64_t, const Part& part) {
    const bool has_hard = problem.labels && !for_teacher;
    worker.gradient(part, rows[part.row], float(softs[part.row] / problem.temperature),
                    has_hard ? hards[part.row] : 0.0f, sum_of_weights, for_teacher,
                    out + part.row * row_bytes + part.begin * element);
  });
  return gradient;
}

}  // namespace
}  // namespace trine

#define TRINE_SOFTMAX_KL_ARGUMENTS                                                          \
  "Tensor student_logits, Tensor teacher, Tensor? teacher_indices, Tensor? labels, "        \
  "Tensor? class_weight, Tensor? row_mask, float temperature, str divergence, float beta, " \
  "float label_smoothing, int classes, float student_scale, float student_cap, "            \
  "float teacher_scale, float teacher_cap, bool teacher_is_log"

STABLE_TORCH_LIBRARY_FRAGMENT(trine, m) {
  // No defaults: the public call has them. Compiled graphs that torch caches on disk leave out
  // arguments that equal a default, and would be taken for those of a version without them.
  m.def("softmax_kl(" TRINE_SOFTMAX_KL_ARGUMENTS ") -> (Tensor soft, Tensor hard, Tensor saved)");
  m.def("softmax_kl_backward(Tensor grad_soft, Tensor grad_hard, " TRINE_SOFTMAX_KL_ARGUMENTS
        ", Tensor saved, bool for_teacher) -> Tensor");
  // Both, for gradients of the rows' losses that are known beforehand.
  m.def("softmax_kl_with_gradient(" TRINE_SOFTMAX_KL_ARGUMENTS
        ", Tensor soft_coefficient, Tensor hard_coefficient) -> "
        "(Tensor soft, Tensor hard, Tensor gradient, Tensor saved)");
  // Multiplies a gradient that is nobody else's yet; 0 makes 0 of whatever was there.
  m.def("softmax_kl_scale_(Tensor(a!) gradient, Tensor factor) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(trine, CPU, m) {
  m.impl("softmax_kl", TORCH_BOX(&trine::softmax_kl_op<trine::forward>));
  m.impl("softmax_kl_backward", TORCH_BOX(&trine::softmax_kl_backward_op<trine::backward>));
}
