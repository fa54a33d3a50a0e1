#include <tuple>

#include "common/cuda/torch.h"
#include "common/cuda/torch_linear.h"
#include "softmax_kl/cuda.h"
#include "softmax_kl/problem.h"

namespace trine {
namespace {

// Of the saved tensor, on every backend; a row takes less here.
constexpr int64_t kSavedColumns = 10;
static_assert(sizeof(SavedRow) <= kSavedColumns * sizeof(float));

template <class T>
const T* data_or_null(const Optional& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

LogitsOnDevice on_device(const Logits& logits, double temperature) {
  const double scale = logits.seen.scale, cap = logits.seen.cap;
  const double rate = std::numbers::log2e / temperature * (cap != 0 ? cap : scale);
  return {logits.rows.data, logits.rows.type, logits.rows.row_bytes, float(rate),
          float(cap != 0 ? scale / cap : 0)};
}

SoftmaxKlOnDevice on_device(const Problem& problem) {
  check(problem.classes <= 1 << 30, kOp, ": there are ", problem.classes,
        " classes, more than CUDA kernels count");
  SoftmaxKlOnDevice made = {};
  made.rows = problem.rows();
  made.classes = int(problem.classes);
  made.first = on_device(problem.student, problem.temperature);
  made.second = on_device(problem.teacher, problem.temperature);
  made.hard = {data_or_null<int64_t>(problem.labels), data_or_null<float>(problem.class_weight),
               float(problem.smoothing), on_device(problem.student, 1.0).rate};
  made.reversed = problem.reversed;
  if (problem.reversed) std::swap(made.first, made.second);
  made.divergence = problem.divergence;
  made.row_mask = data_or_null<bool>(problem.row_mask);
  if (problem.slots)
    made.top_k = {true, problem.slots->wide, int(problem.slots->count),
                  problem.slots->owner.const_data_ptr()};
  return made;
}

void check_devices(const Arguments& arguments) {
  check_same_device(kOp, arguments.student, {&arguments.teacher});
  for (const Optional* tensor :
       {&arguments.slots, &arguments.labels, &arguments.class_weight, &arguments.row_mask})
    if (*tensor) check_same_device(kOp, arguments.student, {&**tensor});
}

// Tensors of a value a row, not written yet.
struct RowResults {
  Tensor soft, hard, saved;

  RowResults(const Tensor& like, const Problem& problem)
      : soft(new_tensor(like, {problem.rows()}, ScalarType::Float)),
        hard(new_tensor(like, {problem.labels ? problem.rows() : 0}, ScalarType::Float)),
        saved(new_tensor(like, {problem.rows(), kSavedColumns}, ScalarType::Float)) {}

  float* softs() const { return static_cast<float*>(soft.mutable_data_ptr()); }
  float* hards() const { return static_cast<float*>(hard.mutable_data_ptr()); }
  SavedRow* rows() const { return static_cast<SavedRow*>(saved.mutable_data_ptr()); }
};

Results forward(const Arguments& arguments) {
  check_devices(arguments);
  const DeviceGuard guard(arguments.student.get_device_index());
  const Problem problem = read(arguments);
  const RowResults results(arguments.student, problem);
  softmax_kl_cuda(on_device(problem), results.softs(), results.hards(), results.rows(),
                  current_stream(arguments.student));
  return {results.soft, results.hard, results.saved};
}

// What arrives at the rows' losses, kept alive; and the gradient, not written yet.
struct Gradient {
  Tensor of_soft, of_hard, gradient;
  bool for_teacher;

  Gradient(const Arguments& arguments, const Problem& problem, const Tensor& soft,
           const Tensor& hard, bool for_teacher)
      : of_soft(gradient_of_rows(soft, problem.rows(), "the soft loss's gradient")),
        of_hard(gradient_of_rows(hard, problem.labels ? problem.rows() : 0,
                                 "the cross entropy's gradient")),
        gradient(new_like(for_teacher ? arguments.teacher : arguments.student)),
        for_teacher(for_teacher) {
    check_same_device(kOp, arguments.student, {&soft, &hard});
  }
  GradientOnDevice on_device() const {
    return {static_cast<const float*>(of_soft.const_data_ptr()),
            static_cast<const float*>(of_hard.const_data_ptr()), for_teacher,
            gradient.mutable_data_ptr(), gradient.size(gradient.dim() - 1)};
  }

 private:
  static Tensor new_like(const Tensor& logits) {
    return new_tensor(logits, std::vector<int64_t>(logits.sizes().begin(), logits.sizes().end()));
  }
};

Tensor backward(const Tensor& grad_soft, const Tensor& grad_hard, const Arguments& arguments,
                const Tensor& saved, bool for_teacher) {
  check_devices(arguments);
  check_same_device(kOp, arguments.student, {&saved});
  const DeviceGuard guard(arguments.student.get_device_index());
  const Problem problem = read(arguments);
  check(!(for_teacher && problem.slots), kOp,
        ": a teacher known by some classes alone gets no gradient");
  const Gradient gradient(arguments, problem, grad_soft, grad_hard, for_teacher);
  check(saved.scalar_type() == ScalarType::Float && saved.dim() == 2 &&
            saved.size(0) == problem.rows() && saved.size(1) == kSavedColumns &&
            saved.is_contiguous(),
        kOp, ": the saved rows must be as the forward op returned them");
  softmax_kl_backward_cuda(on_device(problem), static_cast<const SavedRow*>(saved.const_data_ptr()),
                           gradient.on_device(), current_stream(arguments.student));
  return gradient.gradient;
}

ResultsWithGradient with_gradient(const Arguments& arguments, const Tensor& soft_coefficient,
                                  const Tensor& hard_coefficient) {
  check_devices(arguments);
  const DeviceGuard guard(arguments.student.get_device_index());
  const Problem problem = read(arguments);
  const Gradient gradient(arguments, problem, soft_coefficient, hard_coefficient, false);
  const RowResults results(arguments.student, problem);
  softmax_kl_with_gradient_cuda(on_device(problem), results.softs(), results.hards(),
                                results.rows(), gradient.on_device(),
                                current_stream(arguments.student));
  return {results.soft, results.hard, gradient.gradient, results.saved};
}

void scale(const Tensor& gradient, const Tensor& factor) {
  check_same_device(kOp, gradient, {&factor});
  const DeviceGuard guard(gradient.get_device_index());
  check_dtype(factor, ScalarType::Float, "float32", kOp, "the factor");
  check(factor.numel() == 1 && gradient.dim() > 0 && gradient.is_contiguous(), kOp,
        ": a gradient in one piece is scaled by one number");
  const int64_t width = gradient.size(gradient.dim() - 1);
  softmax_kl_scale_cuda(gradient.mutable_data_ptr(), float_type(gradient, kOp, "the gradient"),
                        width == 0 ? 0 : gradient.numel() / width, width,
                        static_cast<const float*>(factor.const_data_ptr()),
                        current_stream(gradient));
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_IMPL(trine, CUDA, m) {
  m.impl("softmax_kl", TORCH_BOX(&trine::softmax_kl_op<trine::forward>));
  m.impl("softmax_kl_backward", TORCH_BOX(&trine::softmax_kl_backward_op<trine::backward>));
  m.impl("softmax_kl_with_gradient",
         TORCH_BOX(&trine::softmax_kl_with_gradient_op<trine::with_gradient>));
  m.impl("softmax_kl_scale_", TORCH_BOX(&trine::scale));
}
