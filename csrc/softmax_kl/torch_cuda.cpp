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

Results forward(const Arguments& arguments) {
  check_devices(arguments);
  const DeviceGuard guard(arguments.student.get_device_index());
  const Problem problem = read(arguments);
  const int64_t m = problem.rows();
  Tensor soft = new_tensor(arguments.student, {m}, ScalarType::Float);
  Tensor hard = new_tensor(arguments.student, {problem.labels ? m : 0}, ScalarType::Float);
  Tensor saved = new_tensor(arguments.student, {m, kSavedColumns}, ScalarType::Float);
  softmax_kl_cuda(on_device(problem), static_cast<float*>(soft.mutable_data_ptr()),
                  static_cast<float*>(hard.mutable_data_ptr()),
                  static_cast<SavedRow*>(saved.mutable_data_ptr()),
                  current_stream(arguments.student));
  return {soft, hard, saved};
}

Tensor backward(const Tensor& grad_soft, const Tensor& grad_hard, const Arguments& arguments,
                const Tensor& saved, bool for_teacher) {
  check_devices(arguments);
  check_same_device(kOp, arguments.student, {&grad_soft, &grad_hard, &saved});
  const DeviceGuard guard(arguments.student.get_device_index());
  const Problem problem = read(arguments);
  check(!(for_teacher && problem.slots), kOp,
        ": a teacher known by some classes alone gets no gradient");
  const int64_t m = problem.rows();
  const Tensor of_soft = gradient_of_rows(grad_soft, m, "the soft loss's gradient");
  const Tensor of_hard =
      gradient_of_rows(grad_hard, problem.labels ? m : 0, "the cross entropy's gradient");
  check(saved.scalar_type() == ScalarType::Float && saved.dim() == 2 && saved.size(0) == m &&
            saved.size(1) == kSavedColumns && saved.is_contiguous(),
        kOp, ": the saved rows must be as the forward op returned them");
  const Tensor& logits = for_teacher ? arguments.teacher : arguments.student;
  Tensor gradient =
      new_tensor(logits, std::vector<int64_t>(logits.sizes().begin(), logits.sizes().end()));
  softmax_kl_backward_cuda(on_device(problem), static_cast<const SavedRow*>(saved.const_data_ptr()),
                           {static_cast<const float*>(of_soft.const_data_ptr()),
                            static_cast<const float*>(of_hard.const_data_ptr()), for_teacher,
                            gradient.mutable_data_ptr(), logits.size(logits.dim() - 1)},
                           current_stream(arguments.student));
  return gradient;
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_IMPL(trine, CUDA, m) {
  m.impl("softmax_kl", TORCH_BOX(&trine::softmax_kl_op<trine::forward>));
  m.impl("softmax_kl_backward", TORCH_BOX(&trine::softmax_kl_backward_op<trine::backward>));
}
