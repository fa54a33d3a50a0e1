#include "common/cuda/torch_linear.h"
#include "sparse24_linear/cuda.h"
#include "sparse24_linear/torch.h"

namespace trine {
namespace {

constexpr const char* kOp = "sparse24_linear";
constexpr int64_t kUnit = 16;  // bytes that a kernel loads at a time

// Rows of 16-bit x as the kernels read them: x itself where its rows begin and end at whole units,
// a padded copy otherwise.
class FloatInputOnDevice {
 public:
  FloatInputOnDevice(const Tensor& x, const Matrix& rows)
      : owner_(rows.owner), data_(rows.data), row_bytes_(rows.row_bytes) {
    const int64_t element = kFloatBytes[static_cast<int>(rows.type)];
    bytes_ = round_up(rows.k * element, kUnit);
    const bool begin_whole =
        reinterpret_cast<uintptr_t>(data_) % kUnit == 0 && (row_bytes_ % kUnit == 0 || rows.m == 1);
    if (begin_whole && rows.k * element == bytes_) return;
    const Tensor matrix = torch::stable::reshape(x, {rows.m, rows.k});
    const int64_t padding = bytes_ / element - rows.k;
    owner_ = padding > 0 ? torch::stable::pad(matrix, {0, padding}) : torch::stable::clone(matrix);
    data_ = static_cast<const char*>(owner_.const_data_ptr());
    row_bytes_ = bytes_;
  }

  void describe(DeviceSparse24& sparse) const {
    sparse.linear.q = reinterpret_cast<const int8_t*>(data_);
    sparse.linear.q_stride = round_up(row_bytes_, kUnit);  // that of a single row plays no role
    sparse.x_bytes = bytes_;
  }

 private:
  Tensor owner_;
  const char* data_;
  int64_t row_bytes_, bytes_;
};

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
    input.describe(sparse);
    run();
  }
  return y;
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_IMPL(trine, CUDA, m) {
  m.impl("sparse24_linear", TORCH_BOX(&trine::sparse24_linear_on_device));
}
