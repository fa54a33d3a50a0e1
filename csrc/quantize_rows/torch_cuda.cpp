#include <tuple>

#include "common/cuda/torch.h"
#include "common/torch_linear.h"
#include "quantize_rows/cuda.h"

namespace trine {
namespace {

std::tuple<Tensor, Tensor, Tensor> quantize_rows_on_device(const Tensor& x) {
  const DeviceGuard guard(x.get_device_index());
  const Matrix rows = as_matrix(x, "quantize_rows", "x", kQuantizeRowsMaxK);
  const RowTensors to = new_quantized_rows(x, rows);
  quantize_rows_cuda(rows.data, rows.type, rows.m, rows.k, rows.row_bytes,
                     {to.q_data(), rows.k, to.scale_data(), to.sum_data()}, current_stream(x));
  return {to.q, to.scale, to.sum};
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_IMPL(trine, CUDA, m) {
  m.impl("quantize_rows", TORCH_BOX(&trine::quantize_rows_on_device));
}
