#include "softmax_kl/softmax_kl.h"

#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/torch_linear.h"

namespace trine {
namespace {

constexpr const char* kOp = "softmax_kl";

constexpr SoftmaxKlKernel kKernels[] = {
#if defined(TRINE_X86)
    {Isa::avx512, softmax_kl_avx512, softmax_kl_student_gradient_avx512,
     softmax_kl_teacher_gradient_avx512},
    {Isa::avx2, softmax_kl_avx2, softmax_kl_student_gradient_avx2,
     softmax_kl_teacher_gradient_avx2},
#elif defined(TRINE_ARM64)
    {Isa::neon, softmax_kl_neon, softmax_kl_student_gradient_neon,
     softmax_kl_teacher_gradient_neon},
#endif
    {Isa::scalar, softmax_kl_scalar, softmax_kl_student_gradient_scalar,
     softmax_kl_teacher_gradient_scalar},
};
[[maybe_unused]] const bool announced = announce(kOp, kKernels);

// Rows are whole per thread, so the number of threads never changes a result.
template <class Row>
void parallel_rows(int64_t rows, int64_t n, const Row& run) {
  constexpr int64_t kWorthAThread = 1 << 14;  // elements: 10 us or so
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(n, 1));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i);
  });
}

struct Problem {
  Matrix student, teacher;
  float inverse_temperature;
};

std::string shape_of(const Tensor& tensor) {
  std::string text;
  for (const int64_t size : tensor.sizes())
    text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

Problem read(const Tensor& student, const Tensor& teacher, double temperature) {
  // Before the dtypes: class labels in the teacher's place are better told by their shape.
  check(std::equal(student.sizes().begin(), student.sizes().end(), teacher.sizes().begin(),
                   teacher.sizes().end()),
        kOp, ": student_logits and teacher_logits must have the same shape; they have ",
        shape_of(student), " and ", shape_of(teacher));
  Problem problem{as_matrix(student, kOp, "student_logits"),
                  as_matrix(teacher, kOp, "teacher_logits"), float(1 / temperature)};
  check(temperature > 0 && problem.inverse_temperature > 0 &&
            problem.inverse_temperature <= std::numeric_limits<float>::max(),
        kOp, ": temperature must be positive and finite, it is ", temperature);
  return problem;
}

// What the sum over rows is divided by; 1 for "none", whose losses are not summed.
double denominator(const std::string& reduction, const Matrix& logits) {
  if (reduction == "batchmean") return double(logits.m);
  if (reduction == "mean") return double(logits.m) * double(logits.k);
  check(reduction == "sum" || reduction == "none", kOp,
        ": reduction must be 'batchmean', 'sum', 'mean' or 'none', it is '", reduction, "'");
  return 1;
}

std::tuple<Tensor, Tensor> softmax_kl_cpu(const Tensor& student, const Tensor& teacher,
                                          double temperature, std::string reduction) {
  const Problem problem = read(student, teacher, temperature);
  const double divisor = denominator(reduction, problem.student);
  const int64_t m = problem.student.m, n = problem.student.k;
  Tensor saved = torch::stable::new_empty(student, {m, kSoftmaxKlColumns}, ScalarType::Float);
  auto* rows = static_cast<SoftmaxKlRow*>(saved.mutable_data_ptr());
  const SoftmaxKlKernel& kernel = select(kKernels);
  parallel_rows(m, n, [&](int64_t i) {
    if (n == 0)
      rows[i] = {};  // an empty sum
    else
      kernel.forward({problem.student.row(i), problem.student.type},
                     {problem.teacher.row(i), problem.teacher.type}, n, problem.inverse_temperature,
                     rows + i);
  });

  const bool per_row = reduction == "none";
  std::vector<int64_t> shape;
  if (per_row) shape.assign(student.sizes().begin(), student.sizes().end() - 1);
  Tensor loss = torch::stable::new_empty(student, shape, ScalarType::Float);
  auto* losses = static_cast<float*>(loss.mutable_data_ptr());
  const double squared = temperature * temperature;
  double total = 0;
  for (int64_t i = 0; i < m; ++i) {
    if (per_row) losses[i] = static_cast<float>(squared * rows[i].kl);
    total += rows[i].kl;
  }
  if (!per_row) *losses = static_cast<float>(squared * total / divisor);
  return {loss, saved};
}

Tensor softmax_kl_backward_cpu(const Tensor& grad_loss, const Tensor& student,
                               const Tensor& teacher, const Tensor& saved, double temperature,
                               std::string reduction, bool for_teacher) {
  const Problem problem = read(student, teacher, temperature);
  const double divisor = denominator(reduction, problem.student);
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
  const Matrix& matrix = for_teacher ? problem.teacher : problem.student;
  Tensor gradient = torch::stable::new_empty(
      logits, std::vector<int64_t>(logits.sizes().begin(), logits.sizes().end()));
  auto* out = static_cast<char*>(gradient.mutable_data_ptr());
  const int64_t row_bytes = n * kFloatBytes[static_cast<int>(matrix.type)];
  const SoftmaxKlKernel& kernel = select(kKernels);
  const auto run = for_teacher ? kernel.teacher_gradient : kernel.student_gradient;
  parallel_rows(m, n, [&](int64_t i) {
    const double scale = double(upstream[per_row ? i : 0]) * temperature / divisor;
    if (scale == 0)  // a row that is masked out costs nothing, and its NaN stays in the loss
      std::memset(out + i * row_bytes, 0, static_cast<std::size_t>(row_bytes));
    else
      run({problem.student.row(i), problem.student.type},
          {problem.teacher.row(i), problem.teacher.type}, n, problem.inverse_temperature, rows[i],
          static_cast<float>(scale), out + i * row_bytes);
  });
  return gradient;
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_FRAGMENT(trine, m) {
  m.def(
      "softmax_kl(Tensor student_logits, Tensor teacher_logits, float temperature=1.0, "
      "str reduction=\"batchmean\") -> (Tensor, Tensor)");
  m.def(
      "softmax_kl_backward(Tensor grad_loss, Tensor student_logits, Tensor teacher_logits, "
      "Tensor saved, float temperature, str reduction, bool for_teacher) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(trine, CPU, m) {
  m.impl("softmax_kl", TORCH_BOX(&trine::softmax_kl_cpu));
  m.impl("softmax_kl_backward", TORCH_BOX(&trine::softmax_kl_backward_cpu));
}
