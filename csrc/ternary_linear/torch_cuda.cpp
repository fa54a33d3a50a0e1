#include "common/cuda/torch_linear.h"
#include "ternary_linear/cuda.h"
#include "ternary_linear/torch.h"

namespace trine {
namespace {

constexpr const char* kOp = "ternary_linear";

Tensor ternary_linear_on_device(const Tensor& x, const Tensor& packed_weight,
                                const Tensor& weight_scale, const std::optional<Tensor>& bias) {
  const DeviceGuard guard(x.get_device_index());
  const Matrix rows = as_matrix(x, kOp, "x", kTernaryMaxK);
  const auto [n, words, group_size] = check_ternary_weight(kOp, rows, packed_weight, weight_scale);
  check_same_device(kOp, x, {&packed_weight, &weight_scale});
  const Tensor weight = aligned_rows(packed_weight, kOp);
  const Tensor scale = torch::stable::contiguous(weight_scale);
  Tensor y = torch::stable::new_empty(x, linear_shape(x, n));
  if (rows.m == 0 || n == 0) return y;

  const cudaStream_t stream = current_stream(x);
  const QuantizedInputOnDevice input(x, rows, std::nullopt, stream);
  DeviceLinear linear = input.linear();
  linear.n = n;
  linear.weight = static_cast<const uint8_t*>(weight.const_data_ptr());
  linear.weight_stride = words * int64_t(sizeof(int32_t));
  linear.weight_scale = static_cast<const float*>(scale.const_data_ptr());
  linear.per_tensor = group_size == 0 && scale.numel() == 1;
  linear.y = y.mutable_data_ptr();
  linear.type = rows.type;
  std::optional<Tensor> bias_values;
  if (bias) {
    check_same_device(kOp, x, {&*bias});
    bias_values = torch::stable::contiguous(*bias);
    set_bias(linear, *bias_values, kOp);
  }
  if (group_size == 0)
    ternary_linear_cuda(linear, stream);
  else
    ternary_linear_grouped_cuda(linear, group_size, rows.k / group_size, stream);
  return y;
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_IMPL(trine, CUDA, m) {
  m.impl("ternary_linear", TORCH_BOX(&trine::ternary_linear_on_device));
}
