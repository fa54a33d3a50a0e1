#include <tuple>

#include "common/cuda/torch_linear.h"
#include "rms_norm_quantize_rows/cuda.h"
#include "rms_norm_quantize_rows/torch.h"

namespace trine {
namespace {

constexpr const char* kOp = "rms_norm_quantize_rows";

std::tuple<Tensor, Tensor, Tensor> rms_norm_quantize_rows_on_device(
    const Tensor& x, const std::optional<Tensor>& weight, double eps) {
  const DeviceGuard guard(x.get_device_index());
  const Matrix rows = read_rows_to_norm(kOp, x, weight);
  NormOnDevice norm = {nullptr, false, static_cast<float>(eps)};
  std::optional<Tensor> values;  // of the weight, in x's type or float
  if (weight.has_value()) {
    check_same_device(kOp, x, {&*weight});
    values = torch::stable::contiguous(*weight);
    if (float_type(*values, kOp, "weight") != rows.type)
      values = torch::stable::to(*values, ScalarType::Float);
    norm.weight = values->const_data_ptr();
    norm.weight_is_float = values->scalar_type() == ScalarType::Float;
  }
  const RowTensors to = new_quantized_rows(x, rows);
  rms_norm_quantize_rows_cuda(rows.data, rows.type, rows.m, rows.k, rows.row_bytes, norm,
                              {to.q_data(), rows.k, to.scale_data(), to.sum_data()},
                              current_stream(x));
  return {to.q, to.scale, to.sum};
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_IMPL(trine, CUDA, m) {
  m.impl("rms_norm_quantize_rows", TORCH_BOX(&trine::rms_norm_quantize_rows_on_device));
}
