#include "common/cuda/torch_linear.h"
#include "sparse24_linear/cuda.h"
#include "sparse24_linear/sparse24_linear.h"
#include "ternary24_linear/cuda.h"
#include "ternary24_linear/torch.h"

namespace trine {
namespace {

constexpr const char* kOp = "ternary24_linear";

// By the kernels of sparse24_linear; `linear` holds the packed weight, of k columns.
void multiply_unpacked(DeviceLinear linear, int64_t k, const Tensor& like, cudaStream_t stream) {
  const int64_t chunks = round_up(k, kSparse24Columns) / kSparse24Columns;
  Tensor values =
      torch::stable::new_empty(like, {linear.n, chunks * kSparse24Values}, ScalarType::Char);
  Tensor indices = torch::stable::new_empty(like, {linear.n, chunks}, ScalarType::Int);
  auto* words = static_cast<uint32_t*>(indices.mutable_data_ptr());
  ternary24_unpack_cuda(linear.weight, linear.weight_stride, linear.n, k,
                        static_cast<int8_t*>(values.mutable_data_ptr()), words, stream);
  linear.weight = static_cast<const uint8_t*>(values.const_data_ptr());
  linear.weight_stride = chunks * kSparse24Values;
  sparse24_linear_cuda({linear, linear.q_stride, words, chunks, Sparse24Values::int8}, stream);
}

Tensor ternary24_linear_on_device(const Tensor& x, const Tensor& packed_weight,
                                  const Tensor& weight_scale, const std::optional<Tensor>& bias) {
  const DeviceGuard guard(x.get_device_index());
  const Matrix rows = as_matrix(x, kOp, "x", kTernary24MaxK);
  const int64_t n = check_ternary24_weight(kOp, rows.k, packed_weight, weight_scale);
  check_same_device(kOp, x, {&packed_weight, &weight_scale});
  const Tensor weight = aligned_rows(packed_weight, kOp);
  const Tensor scale = torch::stable::contiguous(weight_scale);
  const LinearShape shape = linear_shape(x, rows);
  Tensor y = shape.new_output(x, n);
  if (rows.m == 0 || n == 0) return y;

  const cudaStream_t stream = current_stream(x);
  const QuantizedInputOnDevice input(x, rows, std::nullopt, stream);
  DeviceLinear linear = input.linear();
  linear.n = n;
  linear.weight = static_cast<const uint8_t*>(weight.const_data_ptr());
  linear.weight_stride = ternary24_row_bytes(rows.k);
  linear.weight_scale = static_cast<const float*>(scale.const_data_ptr());
  linear.per_tensor = scale.numel() == 1;
  linear.y = y.mutable_data_ptr();
  linear.type = shape.type;
  std::optional<Tensor> bias_values;
  if (bias) {
    check_same_device(kOp, x, {&*bias});
    bias_values = torch::stable::contiguous(*bias);
    set_bias(linear, *bias_values, kOp);
  }
  if (rows.m <= kTernary24FewRows)
    ternary24_linear_few_cuda(linear, stream);
  else
    multiply_unpacked(linear, rows.k, x, stream);
  return y;
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_IMPL(trine, CUDA, m) {
  m.impl("ternary24_linear", TORCH_BOX(&trine::ternary24_linear_on_device));
}
