#include "common/cuda/torch_linear.h"
#include "int8_embedding/cuda.h"
#include "int8_embedding/torch.h"

namespace trine {
namespace {

Tensor int8_embedding_on_device(const Tensor& indices, const Tensor& packed_weight,
                                const Tensor& weight_scale, int64_t dim, ScalarType dtype) {
  const DeviceGuard guard(indices.get_device_index());
  const bool wide = check_int8_embedding(indices, packed_weight, weight_scale, dim);
  const FloatType type = float_type(dtype, kInt8Embedding, "dtype");
  check_same_device(kInt8Embedding, indices, {&packed_weight, &weight_scale});
  const Tensor at = as_contiguous(indices), codes = aligned_rows(packed_weight, kInt8Embedding),
               scale = as_contiguous(weight_scale);
  Tensor y = new_embedding(indices, dim, dtype);
  int8_embedding_cuda(
      {at.const_data_ptr(), wide, at.numel(), static_cast<const int8_t*>(codes.const_data_ptr()),
       codes.size(1), static_cast<const float*>(scale.const_data_ptr()), codes.size(0), dim,
       y.mutable_data_ptr(), type},
      current_stream(indices));
  return y;
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_IMPL(trine, CUDA, m) {
  m.impl("int8_embedding", TORCH_BOX(&trine::int8_embedding_on_device));
}
