#include "softmax_kl/softmax_kl.h"

#include <cstring>
#include <limits>
#include <numbers>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/dispatch.h"
#include "common/torch_linear.h"
#include "softmax_kl/sums.h"

namespace trine {
namespace {

constexpr const char* kOp = "softmax_kl";

constexpr SoftmaxKlKernel kKernels[] = {
#if defined(TRINE_X86)
    {Isa::avx512, softmax_kl_avx512, softmax_kl_slopes_avx512, softmax_kl_student_gradient_avx512,
     softmax_kl_teacher_gradient_avx512},
    {Isa::avx2, softmax_kl_avx2, softmax_kl_slopes_avx2, softmax_kl_student_gradient_avx2,
     softmax_kl_teacher_gradient_avx2},
#elif defined(TRINE_ARM64)
    {Isa::neon, softmax_kl_neon, softmax_kl_slopes_neon, softmax_kl_student_gradient_neon,
     softmax_kl_teacher_gradient_neon},
#endif
    {Isa::scalar, softmax_kl_scalar, softmax_kl_slopes_scalar, softmax_kl_student_gradient_scalar,
     softmax_kl_teacher_gradient_scalar},
};
[[maybe_unused]] const bool announced = announce(kOp, kKernels);

// Elements of a row that one call of a kernel takes at most. Few long rows thus feed many threads,
// and what merging costs (0.1 us or so) is small beside them.
constexpr int64_t kPart = 1 << 14;

struct Problem {
  Matrix student, teacher;
  float rate;  // log2(e) / T
  Divergence divergence = {};
  bool reversed = false;           // student and teacher are exchanged
  const float* weights = nullptr;  // of the rows; null: all are 1

  bool skips(int64_t row) const { return weights != nullptr && weights[row] == 0; }
  double weight(int64_t row) const { return weights != nullptr ? weights[row] : 1.0; }

  int64_t rows() const { return student.m; }
  int64_t classes() const { return student.k; }
  // A row is cut in the same places whatever the number of threads, and its parts are merged in
  // their order, so that the result does not depend on who computed them.
  int64_t parts() const { return (classes() + kPart - 1) / kPart; }
  int64_t part_size() const {
    constexpr int64_t kAlign = 64;  // whole cache lines
    const int64_t even = (classes() + parts() - 1) / parts();
    return (even + kAlign - 1) / kAlign * kAlign;
  }
};

struct Part {
  int64_t row, begin, size;
  LogitRow student, teacher;
};

// Calls run(i, part) for part i of those of rows begin to end - 1 that count.
template <class Run>
void for_each_part(const Problem& problem, int64_t begin, int64_t end, const Run& run) {
  constexpr int64_t kWorthAThread = 1 << 14;  // elements: 10 us or so
  if (problem.classes() == 0) return;
  const int64_t n = problem.classes(), parts = problem.parts(), size = problem.part_size();
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / n);
  torch::stable::parallel_for(begin * parts, end * parts, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / parts, begin = i % parts * size;
      if (problem.skips(row)) continue;
      const auto logits = [&](const Matrix& matrix) {
        const int64_t offset = begin * kFloatBytes[static_cast<int>(matrix.type)];
        return LogitRow{static_cast<const char*>(matrix.row(row)) + offset, matrix.type};
      };
      run(i, Part{row, begin, std::min(size, n - begin), logits(problem.student),
                  logits(problem.teacher)});
    }
  });
}

std::string shape_of(const Tensor& tensor) {
  std::string text;
  for (const int64_t size : tensor.sizes())
    text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

// A divergence, and whether it is the one with student and teacher exchanged.
std::pair<Divergence, bool> divergence_of(const std::string& name, double beta) {
  struct Named {
    const char* name;
    Divergence::Kind kind;
    bool reversed, takes_beta;
  };
  constexpr Named kNames[] = {
      {"forward_kl", Divergence::kullback_leibler, false, false},
      {"reverse_kl", Divergence::kullback_leibler, true, false},
      {"jsd", Divergence::jensen_shannon, false, true},
      {"skewed_forward_kl", Divergence::skewed_kl, false, true},
      {"skewed_reverse_kl", Divergence::skewed_kl, true, true},
      {"total_variation", Divergence::total_variation, false, false},
  };
  std::string names;
  for (const Named& entry : kNames) {
    if (name == entry.name) {
      check(!entry.takes_beta || (beta > 0 && beta < 1), kOp, ": beta of '", name,
            "' must lie between 0 and 1, it is ", beta,
            "; at the ends are 'forward_kl' and 'reverse_kl'");
      return {{entry.kind, float(beta)}, entry.reversed};
    }
    names += (names.empty() ? "'" : ", '") + std::string(entry.name) + "'";
  }
  check(false, kOp, ": divergence must be one of ", names, "; it is '", name, "'");
  return {};
}

using Optional = std::optional<Tensor>;

Problem read(const Tensor& student, const Tensor& teacher, double temperature,
             const std::string& divergence, double beta, const Optional& row_weight) {
  // Before the dtypes: class labels in the teacher's place are better told by their shape.
  check(std::equal(student.sizes().begin(), student.sizes().end(), teacher.sizes().begin(),
                   teacher.sizes().end()),
        kOp, ": student_logits and teacher_logits must have the same shape; they have ",
        shape_of(student), " and ", shape_of(teacher));
  Problem problem{as_matrix(student, kOp, "student_logits"),
                  as_matrix(teacher, kOp, "teacher_logits"),
                  float(std::numbers::log2e / temperature)};
  check(temperature > 0 && problem.rate > 0 && problem.rate <= std::numeric_limits<float>::max(),
        kOp, ": temperature must be positive and finite, it is ", temperature);
  std::tie(problem.divergence, problem.reversed) = divergence_of(divergence, beta);
  if (problem.reversed) std::swap(problem.student, problem.teacher);
  if (row_weight) {
    check_dtype(*row_weight, ScalarType::Float, "float32", kOp, "row_weight");
    check(row_weight->numel() == problem.rows() && row_weight->is_contiguous(), kOp,
          ": row_weight must be contiguous and hold a weight for each of the ", problem.rows(),
          " rows; its shape is ", shape_of(*row_weight));
    problem.weights = static_cast<const float*>(row_weight->const_data_ptr());
  }
  return problem;
}

// What the sum over rows is divided by; 1 for "none", whose losses are not summed.
double denominator(const std::string& reduction, const Problem& problem) {
  check(
      reduction == "batchmean" || reduction == "mean" || reduction == "sum" || reduction == "none",
      kOp, ": reduction must be 'batchmean', 'sum', 'mean' or 'none', it is '", reduction, "'");
  if (reduction == "sum" || reduction == "none") return 1;
  double rows = 0;
  for (int64_t i = 0; i < problem.rows(); ++i) rows += problem.weight(i);
  return reduction == "mean" ? rows * double(problem.classes()) : rows;
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

void fill_with_nan(FloatType type, char* to, int64_t count) {
  const auto fill = [&]<class T>(T* values) {
    T nan;
    narrow(std::numeric_limits<float>::quiet_NaN(), &nan);
    std::fill(values, values + count, nan);
  };
  switch (type) {
    case FloatType::float32:
      return fill(reinterpret_cast<float*>(to));
    case FloatType::bfloat16:
      return fill(reinterpret_cast<bfloat16*>(to));
    case FloatType::float16:
      return fill(reinterpret_cast<float16*>(to));
  }
}

// Rows that are taken together, so that a second pass over them reads from L3; few enough for what
// is kept of each to be small (1 MB).
int64_t rows_at_a_time(const Problem& problem) {
  const int64_t bytes =
      problem.divergence.kind == Divergence::kullback_leibler ? 64 << 20 : 8 << 20;
  const int64_t row_bytes = problem.classes() * 2 * int64_t(sizeof(float));
  const int64_t rows = std::min<int64_t>(bytes / std::max<int64_t>(1, row_bytes) + 1, 1 << 14);
  return std::min(rows, problem.rows());
}

std::tuple<Tensor, Tensor> softmax_kl_cpu(const Tensor& student, const Tensor& teacher,
                                          Optional row_weight, double temperature,
                                          std::string reduction, std::string divergence,
                                          double beta) {
  const Problem problem = read(student, teacher, temperature, divergence, beta, row_weight);
  const double divisor = denominator(reduction, problem);
  const int64_t m = problem.rows();
  Tensor saved = torch::stable::new_empty(student, {m, kSoftmaxKlColumns}, ScalarType::Float);
  auto* rows = static_cast<SoftmaxKlRow*>(saved.mutable_data_ptr());
  const SoftmaxKlKernel& kernel = select(kKernels);
  const int64_t parts = problem.parts();
  const int64_t step = rows_at_a_time(problem);
  const Scratch of_parts(step * parts * int64_t(sizeof(SoftmaxKlSums)));
  auto* sums = of_parts.data<SoftmaxKlSums>();
  const Scratch slopes_of_parts(step * parts * int64_t(sizeof(SoftmaxKlSlopes)));
  auto* slopes = slopes_of_parts.data<SoftmaxKlSlopes>();
  const Scratch divergences(m * int64_t(sizeof(float)));
  auto* values = divergences.data<float>();
  // Merges the parts of rows, in their order.
  const auto for_rows = [&](int64_t begin, int64_t end, const auto& run) {
    torch::stable::parallel_for(begin, end, 1024, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        if (!problem.skips(i)) run(i);
    });
  };
  std::fill(rows, rows + m, SoftmaxKlRow{});  // stays where rows are skipped or empty
  std::fill(values, values + m, 0.0f);
  for (int64_t begin = 0; begin < m && parts > 0; begin += step) {
    const int64_t end = std::min(begin + step, m);
    for_each_part(problem, begin, end, [&](int64_t i, const Part& part) {
      sums[i - begin * parts] = kernel.forward(part.student, part.teacher, part.size, problem.rate);
    });
    for_rows(begin, end, [&](int64_t i) {
      const SoftmaxKlSums* of_row = sums + (i - begin) * parts;
      SoftmaxKlSums row = of_row[0];
      for (int64_t j = 1; j < parts; ++j) merge(&row, of_row[j], problem.rate);
      const FinishedRow finished = finish(row, problem.rate);
      rows[i] = finished.row;
      values[i] = finished.kl;
    });
    if (problem.divergence.kind == Divergence::kullback_leibler) continue;
    for_each_part(problem, begin, end, [&](int64_t i, const Part& part) {
      slopes[i - begin * parts] = kernel.slopes(part.student, part.teacher, part.size, problem.rate,
                                                rows[part.row], problem.divergence);
    });
    for_rows(begin, end, [&](int64_t i) {
      SoftmaxKlSlopes row{};
      for (int64_t j = 0; j < parts; ++j) add(&row, slopes[(i - begin) * parts + j]);
      values[i] = finish(row, &rows[i]);
    });
  }

  const bool per_row = reduction == "none";
  std::vector<int64_t> shape;
  if (per_row) shape.assign(student.sizes().begin(), student.sizes().end() - 1);
  Tensor loss = torch::stable::new_empty(student, shape, ScalarType::Float);
  auto* losses = static_cast<float*>(loss.mutable_data_ptr());
  const double squared = temperature * temperature;
  double total = 0;
  for (int64_t i = 0; i < m; ++i) {
    if (problem.skips(i)) {
      if (per_row) losses[i] = 0;
      continue;
    }
    const double value = problem.weight(i) * values[i];
    if (per_row) losses[i] = static_cast<float>(squared * value);
    total += value;
  }
  if (!per_row) *losses = static_cast<float>(squared * total / divisor);
  return {loss, saved};
}

Tensor softmax_kl_backward_cpu(const Tensor& grad_loss, const Tensor& student,
                               const Tensor& teacher, Optional row_weight, const Tensor& saved,
                               double temperature, std::string reduction, std::string divergence,
                               double beta, bool for_teacher) {
  const Problem problem = read(student, teacher, temperature, divergence, beta, row_weight);
  const double divisor = denominator(reduction, problem);
  const int64_t m = problem.student.m, n = problem.student.k;
  const bool per_row = reduction == "none";
  check_dtype(grad_loss, ScalarType::Float, "float32", kOp, "the loss's gradient");
  check(grad_loss.numel() == (per_row ? m : 1), kOp, ": the loss's gradient has ",
        grad_loss.numel(), " values; it must have as many as the loss");
  check(saved.scalar_type() == ScalarType::Float && saved.dim() == 2 && saved.size(0) == m &&
            saved.size(1) == kSoftmaxKlColumns && saved.is_contiguous(),
        kOp, ": the saved rows must be as the forward op returned them");

  const Tensor grad_values = torch::stable::contiguous(grad_loss);
  const auto* upstream = static_cast<const float*>(grad_values.const_data_ptr());
  const auto* rows = static_cast<const SoftmaxKlRow*>(saved.const_data_ptr());
  const Tensor& logits = for_teacher ? teacher : student;
  const bool of_second = for_teacher != problem.reversed;  // of the problem's two matrices
  const FloatType type = (of_second ? problem.teacher : problem.student).type;
  Tensor gradient = torch::stable::new_empty(
      logits, std::vector<int64_t>(logits.sizes().begin(), logits.sizes().end()));
  auto* out = static_cast<char*>(gradient.mutable_data_ptr());
  const int64_t element_bytes = kFloatBytes[static_cast<int>(type)];
  advise_huge_pages(out, m * n * element_bytes);
  const SoftmaxKlKernel& kernel = select(kKernels);
  const auto run = of_second ? kernel.teacher_gradient : kernel.student_gradient;
  const int64_t row_bytes = n * element_bytes;
  for (int64_t i = 0; i < m; ++i)
    if (problem.skips(i)) std::memset(out + i * row_bytes, 0, static_cast<std::size_t>(row_bytes));
  for_each_part(problem, 0, m, [&](int64_t, const Part& part) {
    const double scale =
        problem.weight(part.row) * upstream[per_row ? part.row : 0] * temperature / divisor;
    char* to = out + part.row * row_bytes + part.begin * element_bytes;
    if (scale == 0)  // a row that is masked out costs nothing, and its NaN stays in the loss
      std::memset(to, 0, static_cast<std::size_t>(part.size * element_bytes));
    else if (std::isnan(scale) || std::isnan(rows[part.row].log2_ratio))
      fill_with_nan(type, to, part.size);
    else
      run(part.student, part.teacher, part.size, problem.rate, rows[part.row], problem.divergence,
          static_cast<float>(scale), to);
  });
  return gradient;
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_FRAGMENT(trine, m) {
  // No defaults: the public call has them. Compiled graphs that torch caches on disk leave out
  // arguments that equal a default, and would be taken for those of a version without them.
  m.def(
      "softmax_kl(Tensor student_logits, Tensor teacher_logits, Tensor? row_weight, "
      "float temperature, str reduction, str divergence, float beta) -> (Tensor, Tensor)");
  m.def(
      "softmax_kl_backward(Tensor grad_loss, Tensor student_logits, Tensor teacher_logits, "
      "Tensor? row_weight, Tensor saved, float temperature, str reduction, str divergence, "
      "float beta, bool for_teacher) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(trine, CPU, m) {
  m.impl("softmax_kl", TORCH_BOX(&trine::softmax_kl_cpu));
  m.impl("softmax_kl_backward", TORCH_BOX(&trine::softmax_kl_backward_cpu));
}
