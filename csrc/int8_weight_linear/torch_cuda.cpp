#include "common/cuda/torch_linear.h"
#include "int8_weight_linear/cuda.h"
#include "int8_weight_linear/torch.h"

namespace trine {
namespace {

constexpr const char* kOp = "int8_weight_linear";

Tensor int8_weight_linear_on_device(const Tensor& x, const Tensor& packed_weight,
                                    const Tensor& weight_scale, const std::optional<Tensor>& bias) {
  const DeviceGuard guard(x.get_device_index());
  const Matrix rows = as_matrix(x, kOp, "x");
  const auto [n, packed_k, groups] =
      check_int8_weight_only(kOp, rows.k, packed_weight, weight_scale);
  check_same_device(kOp, x, {&packed_weight, &weight_scale});
  const Tensor weight = aligned_rows(packed_weight, kOp);
  const Tensor scale = torch::stable::contiguous(weight_scale);
  DeviceWeightLinear problem = {};
  DeviceLinear& linear = problem.linear;
  linear.m = rows.m;
  linear.n = n;
  std::optional<Tensor> bias_values;
  if (bias) {
    check_same_device(kOp, x, {&*bias});
    bias_values = torch::stable::contiguous(*bias);
    set_bias(linear, *bias_values, kOp);
  }
  Tensor y = linear_shape(x, rows).new_output(x, n);
  if (rows.m == 0 || n == 0) return y;

  const FloatInputOnDevice input(x, rows);
  linear.q = input.data();
  linear.q_stride = input.row_bytes();
  problem.x_bytes = input.bytes();
  linear.weight = static_cast<const uint8_t*>(weight.const_data_ptr());
  linear.weight_stride = packed_k;
  linear.weight_scale = static_cast<const float*>(scale.const_data_ptr());
  linear.y = y.mutable_data_ptr();
  linear.type = rows.type;
  problem.k = rows.k;
  problem.groups = groups;
  problem.group_size = rows.k / groups;
  int8_weight_linear_cuda(problem, current_stream(x));
  return y;
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_IMPL(trine, CUDA, m) {
  m.impl("int8_weight_linear", TORCH_BOX(&trine::int8_weight_linear_on_device));
}
