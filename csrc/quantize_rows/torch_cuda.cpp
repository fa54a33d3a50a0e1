#include <tuple>

#include "common/cuda/torch.h"
#include "common/torch_linear.h"
#include "quantize_rows/cuda.h"

namespace trine {
namespace {

std::tuple<Tensor, Tensor, Tensor> quantize_rows_on_device(const Tensor& x) {
  const DeviceGuard guard(x.get_device_index());
  const Matrix rows = as_matrix(x, "quantize_rows", "x", kQuantizeRowsMaxK);
  Tensor q = torch::stable::new_empty(x, {rows.m, rows.k}, ScalarType::Char);
  Tensor scale = torch::stable::new_empty(x, {rows.m}, ScalarType::Float);
  Tensor sum = torch::stable::new_empty(x, {rows.m}, ScalarType::Int);
  quantize_rows_cuda(rows.data, rows.type, rows.m, rows.k, rows.row_bytes,
                     {static_cast<int8_t*>(q.mutable_data_ptr()), rows.k,
                      static_cast<float*>(scale.mutable_data_ptr()),
                      static_cast<int32_t*>(sum.mutable_data_ptr())},
                     current_stream(x));
  return {q, scale, sum};
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_IMPL(trine, CUDA, m) {
  m.impl("quantize_rows", TORCH_BOX(&trine::quantize_rows_on_device));
}
