#include "common/cuda/torch_linear.h"
#include "int8_linear/cuda.h"
#include "int8_linear/torch.h"

namespace trine {
namespace {

constexpr const char* kOp = "int8_linear";

// `quantize` gives the rows of `shape`; it is called once everything is checked.
template <class Quantize>
Tensor multiply(const Tensor& like, const LinearShape& shape, const Tensor& packed_weight,
                const Tensor& weight_scale, const std::optional<Tensor>& bias, int64_t activation,
                const int32_t* zero_point, cudaStream_t stream, const Quantize& quantize) {
  const int64_t packed_k = check_int8_weight(kOp, shape.k, packed_weight, weight_scale);
  check_same_device(kOp, like, {&packed_weight, &weight_scale});
  const int64_t n = packed_weight.size(0);
  const Tensor weight = aligned_rows(packed_weight, kOp);
  const Tensor scale = torch::stable::contiguous(weight_scale);
  Tensor y = shape.new_output(like, n);
  if (shape.m == 0 || n == 0) return y;

  const QuantizedInputOnDevice input = quantize();
  DeviceLinear linear = input.linear();
  linear.n = n;
  linear.weight = static_cast<const uint8_t*>(weight.const_data_ptr());
  linear.weight_stride = packed_k;
  linear.weight_scale = static_cast<const float*>(scale.const_data_ptr());
  linear.y = y.mutable_data_ptr();
  linear.type = shape.type;
  linear.activation = read_activation(activation, kOp);
  std::optional<Tensor> bias_values;
  if (bias) {
    check_same_device(kOp, like, {&*bias});
    bias_values = torch::stable::contiguous(*bias);
    set_bias(linear, *bias_values, kOp);
  }
  std::optional<Tensor> minus;
  if (zero_point != nullptr) {
    minus = torch::stable::new_empty(like, {n}, ScalarType::Int);
    auto* values = static_cast<int32_t*>(minus->mutable_data_ptr());
    int8_zero_point_cuda(linear, zero_point, values, stream);
    linear.column_minus = values;
  }
  int8_linear_cuda(linear, stream);
  return y;
}

Tensor int8_linear_on_device(const Tensor& x, const Tensor& packed_weight,
                             const Tensor& weight_scale, const std::optional<Tensor>& bias,
                             int64_t activation, const std::optional<Tensor>& input_scale,
                             const std::optional<Tensor>& input_zero_point) {
  const DeviceGuard guard(x.get_device_index());
  check_static_input(kOp, input_scale, input_zero_point);
  const Matrix rows = as_matrix(x, kOp, "x", input_scale ? kInt8MaxKStatic : kInt8MaxK);
  std::optional<StaticScaleOnDevice> fixed;
  if (input_scale) {
    check_same_device(kOp, x, {&*input_scale});
    fixed = {static_cast<const float*>(input_scale->const_data_ptr()), nullptr};
    if (input_zero_point) {
      check_same_device(kOp, x, {&*input_zero_point});
      fixed->zero_point = static_cast<const int32_t*>(input_zero_point->const_data_ptr());
    }
  }
  const cudaStream_t stream = current_stream(x);
  return multiply(x, linear_shape(x, rows), packed_weight, weight_scale, bias, activation,
                  fixed ? fixed->zero_point : nullptr, stream,
                  [&] { return QuantizedInputOnDevice(x, rows, fixed, stream); });
}

Tensor int8_linear_rows_on_device(const Tensor& q, const Tensor& scale, const Tensor& sum,
                                  const Tensor& packed_weight, const Tensor& weight_scale,
                                  const std::optional<Tensor>& bias, ScalarType dtype,
                                  int64_t activation) {
  const DeviceGuard guard(q.get_device_index());
  const RowTensors rows = read_quantized_rows(q, scale, sum, kOp, kInt8MaxK);
  check_same_device(kOp, q, {&scale, &sum});
  return multiply(q, linear_shape(rows, dtype, kOp), packed_weight, weight_scale, bias, activation,
                  nullptr, current_stream(q), [&] { return QuantizedInputOnDevice(rows); });
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_IMPL(trine, CUDA, m) {
  m.impl("int8_linear", TORCH_BOX(&trine::int8_linear_on_device));
  m.impl("int8_linear_rows", TORCH_BOX(&trine::int8_linear_rows_on_device));
}
