#include "common/cuda/torch_linear.h"
#include "ternary_linear/cuda.h"
#include "ternary_linear/torch.h"

namespace trine {
namespace {

constexpr const char* kOp = "ternary_linear";

// `quantize` gives the rows of `shape`; it is called once everything is checked.
template <class Quantize>
Tensor multiply(const Tensor& like, const LinearShape& shape, const Tensor& packed_weight,
                const Tensor& weight_scale, const std::optional<Tensor>& bias, int64_t activation,
                cudaStream_t stream, const Quantize& quantize) {
  const auto [n, words, group_size] =
      check_ternary_weight(kOp, shape.k, packed_weight, weight_scale);
  check_same_device(kOp, like, {&packed_weight, &weight_scale});
  const Tensor weight = aligned_rows(packed_weight, kOp);
  const Tensor scale = torch::stable::contiguous(weight_scale);
  Tensor y = shape.new_output(like, n);
  if (shape.m == 0 || n == 0) return y;

  const QuantizedInputOnDevice input = quantize();
  DeviceLinear linear = input.linear();
  linear.n = n;
  linear.weight = static_cast<const uint8_t*>(weight.const_data_ptr());
  linear.weight_stride = words * int64_t(sizeof(int32_t));
  linear.weight_scale = static_cast<const float*>(scale.const_data_ptr());
  linear.per_tensor = group_size == 0 && scale.numel() == 1;
  linear.y = y.mutable_data_ptr();
  linear.type = shape.type;
  linear.activation = read_activation(activation, kOp);
  std::optional<Tensor> bias_values;
  if (bias) {
    check_same_device(kOp, like, {&*bias});
    bias_values = torch::stable::contiguous(*bias);
    set_bias(linear, *bias_values, kOp);
  }
  if (group_size == 0)
    ternary_linear_cuda(linear, stream);
  else
    ternary_linear_grouped_cuda(linear, group_size, shape.k / group_size, stream);
  return y;
}

Tensor ternary_linear_on_device(const Tensor& x, const Tensor& packed_weight,
                                const Tensor& weight_scale, const std::optional<Tensor>& bias,
                                int64_t activation) {
  const DeviceGuard guard(x.get_device_index());
  const Matrix rows = as_matrix(x, kOp, "x", kTernaryMaxK);
  const cudaStream_t stream = current_stream(x);
  return multiply(x, linear_shape(x, rows), packed_weight, weight_scale, bias, activation, stream,
                  [&] { return QuantizedInputOnDevice(x, rows, std::nullopt, stream); });
}

Tensor ternary_linear_rows_on_device(const Tensor& q, const Tensor& scale, const Tensor& sum,
                                     const Tensor& packed_weight, const Tensor& weight_scale,
                                     const std::optional<Tensor>& bias, ScalarType dtype,
                                     int64_t activation) {
  const DeviceGuard guard(q.get_device_index());
  const RowTensors rows = read_quantized_rows(q, scale, sum, kOp, kTernaryMaxK);
  check_same_device(kOp, q, {&scale, &sum});
  return multiply(q, linear_shape(rows, dtype, kOp), packed_weight, weight_scale, bias, activation,
                  current_stream(q), [&] { return QuantizedInputOnDevice(rows); });
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_IMPL(trine, CUDA, m) {
  m.impl("ternary_linear", TORCH_BOX(&trine::ternary_linear_on_device));
  m.impl("ternary_linear_rows", TORCH_BOX(&trine::ternary_linear_rows_on_device));
}
