#include <tuple>

#include "common/cuda/torch_linear.h"
#include "norm_quantize_rows/cuda.h"
#include "norm_quantize_rows/torch.h"

namespace trine {
namespace {

std::tuple<Tensor, Tensor, Tensor> norm_quantize_rows_on_device(const char* op, Norm norm,
                                                                const Tensor& x,
                                                                OptionalTensor weight,
                                                                OptionalTensor bias, double eps) {
  const DeviceGuard guard(x.get_device_index());
  const Matrix rows = read_rows_to_norm(op, x, weight, bias);
  // `values` becomes what the kernel can read, and must outlive its launch.
  const auto parameter = [&](OptionalTensor& values, const char* name) -> ParameterOnDevice {
    if (!values.has_value()) return {nullptr, false};
    check_same_device(op, x, {&*values});
    values = torch::stable::contiguous(*values);
    if (float_type(*values, op, name) != rows.type)
      values = torch::stable::to(*values, ScalarType::Float);
    return {values->const_data_ptr(), values->scalar_type() == ScalarType::Float};
  };
  const NormOnDevice on_device = {norm, parameter(weight, "weight"), parameter(bias, "bias"),
                                  static_cast<float>(eps)};
  const RowTensors to = new_quantized_rows(x, rows);
  norm_quantize_rows_cuda(rows.data, rows.type, rows.m, rows.k, rows.row_bytes, on_device,
                          {to.q_data(), rows.k, to.scale_data(), to.sum_data()}, current_stream(x));
  return {to.q, to.scale, to.sum};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_quantize_rows_on_device(const Tensor& x,
                                                                    const OptionalTensor& weight,
                                                                    double eps) {
  return norm_quantize_rows_on_device(kRmsNorm, Norm::rms, x, weight, std::nullopt, eps);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_quantize_rows_on_device(const Tensor& x,
                                                                      const OptionalTensor& weight,
                                                                      const OptionalTensor& bias,
                                                                      double eps) {
  return norm_quantize_rows_on_device(kLayerNorm, Norm::layer, x, weight, bias, eps);
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_IMPL(trine, CUDA, m) {
  m.impl("rms_norm_quantize_rows", TORCH_BOX(&trine::rms_norm_quantize_rows_on_device));
  m.impl("layer_norm_quantize_rows", TORCH_BOX(&trine::layer_norm_quantize_rows_on_device));
}
