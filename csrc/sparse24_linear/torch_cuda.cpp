#include "common/cuda/torch_linear.h"
#include "sparse24_linear/cuda.h"
#include "sparse24_linear/torch.h"

namespace trine {
namespace {

constexpr const char* kOp = "sparse24_linear";

Sparse24Values type_of(const Tensor& values) {
  switch (values.scalar_type()) {
    case ScalarType::Char:
      return Sparse24Values::int8;
    case ScalarType::Half:
      return Sparse24Values::float16;
    case ScalarType::BFloat16:
      return Sparse24Values::bfloat16;
    default:
      check(false, kOp,
            ": float32 values have no kernel on this device; store the weight as float16, bfloat16 "
            "or int8, or move the tensors to the CPU");
      return {};
  }
}

Tensor sparse24_linear_on_device(const Tensor& x, const Tensor& values, const Tensor& indices,
                                 const std::optional<Tensor>& bias,
                                 const std::optional<Tensor>& weight_scale) {
  const DeviceGuard guard(x.get_device_index());
  const Matrix rows = check_sparse24(kOp, x, values, indices, weight_scale);
  DeviceSparse24 sparse = {};
  sparse.values = type_of(values);
  const bool int8 = sparse.values == Sparse24Values::int8;
  check(int8 || x.scalar_type() == values.scalar_type(), kOp, ": on CUDA, x (",
        torch::headeronly::toString(x.scalar_type()), ") must have the dtype of float values (",
        torch::headeronly::toString(values.scalar_type()), "); convert one of them with .to()");
  constexpr int64_t kMostK = int64_t{1} << 29;
  check(rows.k <= kMostK, kOp, ": K = ", rows.k, " exceeds ", kMostK, ", the most on CUDA");
  check_same_device(kOp, x, {&values, &indices});
  const int64_t n = values.size(0);
  const Tensor whole_values = aligned_rows(values, kOp, "values");
  const Tensor whole_indices = aligned_rows(indices, kOp, "indices");
  const LinearShape shape = linear_shape(x, rows);

  DeviceLinear& linear = sparse.linear;
  linear.n = n;
  std::optional<Tensor> bias_values, scale;
  if (bias) {
    check_same_device(kOp, x, {&*bias});
    bias_values = torch::stable::contiguous(*bias);
    set_bias(linear, *bias_values, kOp);
  }
  if (weight_scale) {
    check_same_device(kOp, x, {&*weight_scale});
    scale = torch::stable::contiguous(*weight_scale);
  }
  Tensor y = shape.new_output(x, n);
  if (rows.m == 0 || n == 0) return y;

  sparse.chunks = round_up(rows.k, kSparse24Columns) / kSparse24Columns;
  sparse.indices = static_cast<const uint32_t*>(whole_indices.const_data_ptr());
  const auto run = [&] {
    linear.m = rows.m;
    linear.weight = static_cast<const uint8_t*>(whole_values.const_data_ptr());
    linear.weight_stride = sparse.chunks * kSparse24Values * (int8 ? 1 : 2);
    linear.y = y.mutable_data_ptr();
    linear.type = shape.type;
    sparse24_linear_cuda(sparse, current_stream(x));
  };
  if (int8) {
    const QuantizedInputOnDevice input(x, rows, std::nullopt, current_stream(x));
    const DeviceLinear quantized = input.linear();
    linear.q = quantized.q;
    linear.q_stride = sparse.x_bytes = quantized.q_stride;
    linear.x_scale = quantized.x_scale;
    linear.weight_scale = static_cast<const float*>(scale->const_data_ptr());
    run();
  } else {
    const FloatInputOnDevice input(x, rows);
    linear.q = input.data();
    linear.q_stride = round_up(input.row_bytes(), 16);  // that of a single row plays no role
    sparse.x_bytes = input.bytes();
    run();
  }
  return y;
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_IMPL(trine, CUDA, m) {
  m.impl("sparse24_linear", TORCH_BOX(&trine::sparse24_linear_on_device));
}
