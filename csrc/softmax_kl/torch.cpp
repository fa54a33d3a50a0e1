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

// What arrives at the rows' losses, and the gradient of one model's logits, to be written part by
// part.
class Gradient {
 public:
  Gradient(const Arguments& arguments, const Problem& problem, const Tensor& soft,
           const Tensor& hard, bool for_teacher)
      : problem_(problem),
        for_teacher_(for_teacher),
        soft_(gradient_of_rows(soft, problem.rows(), "the soft loss's gradient")),
        hard_(gradient_of_rows(hard, problem.labels ? problem.rows() : 0,
                               "the cross entropy's gradient")),
        softs_(static_cast<const float*>(soft_.const_data_ptr())),
        hards_(static_cast<const float*>(hard_.const_data_ptr())),
        tensor_(like(for_teacher ? arguments.teacher : arguments.student)),
        out_(static_cast<char*>(tensor_.mutable_data_ptr())) {
    for (int64_t j = 0; problem.labels && j < problem.classes; ++j)
      sum_of_weights_ += problem.weight(j);
    const Matrix& matrix = (for_teacher ? problem.teacher : problem.student).rows;
    element_ = bytes_of(matrix.type);
    row_bytes_ = matrix.k * element_;
    advise_huge_pages(out_, problem.rows() * row_bytes_);
    for (int64_t i = 0; i < problem.rows(); ++i) {
      const int64_t written = problem.skips(i) ? 0 : problem.classes * element_;
      std::memset(out_ + i * row_bytes_ + written, 0,
                  static_cast<std::size_t>(row_bytes_ - written));
    }
  }

  const Tensor& tensor() const { return tensor_; }
  void* at(const Part& part) const { return out_ + part.row * row_bytes_ + part.begin * element_; }
  void write(const Worker& worker, const Part& part, const Saved& saved, const Kept& kept) const {
    const bool has_hard = problem_.labels && !for_teacher_;
    worker.gradient(part, saved, float(softs_[part.row] / problem_.temperature),
                    has_hard ? hards_[part.row] : 0.0f, sum_of_weights_, for_teacher_, kept,
                    at(part));
  }

 private:
  static Tensor like(const Tensor& logits) {
    return new_tensor(logits, std::vector<int64_t>(logits.sizes().begin(), logits.sizes().end()));
  }

  const Problem& problem_;
  bool for_teacher_;
  Tensor soft_, hard_;
  const float *softs_, *hards_;
  Tensor tensor_;
  char* out_;
  double sum_of_weights_ = 0;
  int64_t element_, row_bytes_;
};

// The losses of all rows, and the gradient of the student's logits if there is one to write.
Results compute(const Arguments& arguments, const Problem& problem, const Gradient* gradient) {
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

  const bool again = problem.has_slopes();
  // Each pass over a row begins where the one before ended, with what is still in L2. The sums of
  // parts are merged in one order, however many threads there are.
  const auto in_turn = [&](int64_t j) { return again ? parts - 1 - j : j; };
  const auto finish_first = [&](const Worker& worker, int64_t i, const PartSums& row) {
    if (problem.labels) hards[i] = worker.hard(i, row, &rows[i]);
    softs[i] = worker.soft(i, row, &rows[i]);
  };
  const auto kept_of = [&](const Worker& worker, const Part& part) {
    return worker.kept(part, gradient == nullptr ? nullptr : gradient->at(part));
  };
  const auto slopes_of = [&](const Worker& worker, const Part& part) {
    return worker.slopes(part, rows[part.row].soft, kept_of(worker, part));
  };
  const auto write = [&](const Worker& worker, const Part& part) {
    gradient->write(worker, part, rows[part.row], kept_of(worker, part));
  };
  if (m >= kRowsAThread * int64_t(torch::stable::get_num_threads())) {
    const int64_t rows_worth_a_thread = std::max<int64_t>(1, grain(problem) / parts);
    torch::stable::parallel_for(0, m, rows_worth_a_thread, [&](int64_t first, int64_t last) {
      const Worker worker(problem, kernel, gradient != nullptr);
      for (int64_t i = first; i < last; ++i) {
        if (problem.skips(i)) continue;
        SoftmaxKlMaxima maxima;
        for (int64_t j = 0; again && j < parts; ++j)
          merge(&maxima, worker.maxima(problem.part(i, j)));
        PartSums sums;
        for (int64_t j = 0; j < parts; ++j) {
          const Part part = problem.part(i, in_turn(j));
          const PartSums next = worker.forward(part, maxima, kept_of(worker, part));
          if (j == 0)
            sums = next;
          else
            merge(&sums, next, problem);
        }
        finish_first(worker, i, sums);
        if (again) {
          SoftmaxKlSlopes slopes{};
          for (int64_t j = 0; j < parts; ++j) add(&slopes, slopes_of(worker, problem.part(i, j)));
          softs[i] = finish(slopes, sums.soft, &rows[i].soft);
        }
        for (int64_t j = parts - 1; gradient != nullptr && j >= 0; --j)
          write(worker, problem.part(i, j));
      }
    });
    return {soft, hard, saved};
  }

  // Few rows: all threads share each.
  const Scratch of_parts(m * parts * int64_t(sizeof(PartSums)));
  const Scratch maxima_of_rows(m * int64_t(sizeof(SoftmaxKlMaxima)));
  auto* sums = of_parts.data<PartSums>();
  auto* maxima = maxima_of_rows.data<SoftmaxKlMaxima>();
  std::fill(maxima, maxima + m, SoftmaxKlMaxima());
  if (again) {
    const Scratch maxima_of_parts(m * parts * int64_t(sizeof(SoftmaxKlMaxima)));
    auto* found = maxima_of_parts.data<SoftmaxKlMaxima>();
    for_each_part(problem, kernel, [&](const Worker& worker, int64_t i, const Part& part) {
      found[i] = worker.maxima(part);
    });
    for (int64_t i = 0; i < m * parts; ++i)
      if (!problem.skips(i / parts)) merge(&maxima[i / parts], found[i]);
  }
  for_each_part(problem, kernel, [&](const Worker& worker, int64_t i, const Part& part) {
    sums[i] = worker.forward(part, maxima[part.row], kept_of(worker, part));
  });
  const Worker worker(problem, kernel);
  for (int64_t i = 0; i < m; ++i) {
    if (problem.skips(i)) continue;
    for (int64_t j = 1; j < parts; ++j)
      merge(&sums[i * parts + in_turn(0)], sums[i * parts + in_turn(j)], problem);
    finish_first(worker, i, sums[i * parts + in_turn(0)]);
  }
  if (again) {
    const Scratch slopes_of_parts(m * parts * int64_t(sizeof(SoftmaxKlSlopes)));
    auto* slopes = slopes_of_parts.data<SoftmaxKlSlopes>();
    for_each_part(problem, kernel, [&](const Worker& worker, int64_t i, const Part& part) {
      slopes[i] = slopes_of(worker, part);
    });
    for (int64_t i = 0; i < m; ++i) {
      if (problem.skips(i)) continue;
      SoftmaxKlSlopes of_row{};
      for (int64_t j = 0; j < parts; ++j) add(&of_row, slopes[i * parts + j]);
      softs[i] = finish(of_row, sums[i * parts + in_turn(0)].soft, &rows[i].soft);
    }
  }
  if (gradient != nullptr)
    for_each_part(problem, kernel,
                  [&](const Worker& worker, int64_t, const Part& part) { write(worker, part); });
  return {soft, hard, saved};
}

Results forward(const Arguments& arguments) {
  return compute(arguments, read_checked(arguments), nullptr);
}

ResultsWithGradient with_gradient(const Arguments& arguments, const Tensor& soft_coefficient,
                                  const Tensor& hard_coefficient) {
  const Problem problem = read_checked(arguments);
  const Gradient gradient(arguments, problem, soft_coefficient, hard_coefficient, false);
  const auto [soft, hard, saved] = compute(arguments, problem, &gradient);
  return {soft, hard, gradient.tensor(), saved};
}

Tensor backward(const Tensor& grad_soft, const Tensor& grad_hard, const Arguments& arguments,
                const Tensor& saved, bool for_teacher) {
  const Problem problem = read_checked(arguments);
  check(!(for_teacher && problem.slots), kOp,
        ": a teacher known by some classes alone gets no gradient");
  const Gradient gradient(arguments, problem, grad_soft, grad_hard, for_teacher);
  check(saved.scalar_type() == ScalarType::Float && saved.dim() == 2 &&
            saved.size(0) == problem.rows() && saved.size(1) == kSavedColumns &&
            saved.is_contiguous(),
        kOp, ": the saved rows must be as the forward op returned them");
  const auto* rows = static_cast<const Saved*>(saved.const_data_ptr());
  for_each_part(problem, *select(kKernels).functions,
                [&](const Worker& worker, int64_t, const Part& part) {
                  gradient.write(worker, part, rows[part.row], {});
                });
  return gradient.tensor();
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
  m.impl("softmax_kl_with_gradient",
         TORCH_BOX(&trine::softmax_kl_with_gradient_op<trine::with_gradient>));
}
