// What the torch_cuda.cpp files of the integer linear ops share: activations quantised on the
// device, and what a kernel is told of the tensors. Nothing here waits for the device.
#pragma once

#include "common/cuda/linear.h"
#include "common/cuda/torch.h"
#include "common/torch_linear.h"
#include "quantize_rows/cuda.h"

namespace trine {

// The rows of a matrix as int8, in memory that torch's allocator gives and takes back in the order
// of the stream.
class QuantizedInputOnDevice {
 public:
  QuantizedInputOnDevice(const Tensor& x, const Matrix& rows,
                         const std::optional<StaticScaleOnDevice>& fixed, cudaStream_t stream)
      : width_(std::max(round_up(rows.k, kActivationAlignment), kActivationAlignment)),
        q_(torch::stable::new_empty(x, {rows.m, width_}, ScalarType::Char)),
        scale_(torch::stable::new_empty(x, {rows.m}, ScalarType::Float)),
        sum_(torch::stable::new_empty(x, {rows.m}, ScalarType::Int)) {
    const QuantizedOnDevice to = {static_cast<int8_t*>(q_.mutable_data_ptr()), width_,
                                  static_cast<float*>(scale_.mutable_data_ptr()),
                                  static_cast<int32_t*>(sum_.mutable_data_ptr())};
    if (fixed.has_value())
      quantize_rows_static_cuda(rows.data, rows.type, rows.m, rows.k, rows.row_bytes, *fixed, to,
                                stream);
    else
      quantize_rows_cuda(rows.data, rows.type, rows.m, rows.k, rows.row_bytes, to, stream);
  }

  // Rows that were quantised before, without a copy where they lie as the kernels want them.
  explicit QuantizedInputOnDevice(const RowTensors& rows)
      : width_(std::max(round_up(rows.k, kActivationAlignment), kActivationAlignment)),
        q_(rows.q),
        scale_(rows.scale),
        sum_(rows.sum) {
    if (width_ != rows.k)
      q_ = torch::stable::pad(q_, {0, width_ - rows.k});
    else if (reinterpret_cast<uintptr_t>(q_.const_data_ptr()) % 16 != 0)
      q_ = torch::stable::clone(q_);
  }

  // All but what belongs to the weight.
  DeviceLinear linear() const {
    DeviceLinear linear = {};
    linear.m = q_.size(0);
    linear.q = static_cast<const int8_t*>(q_.const_data_ptr());
    linear.q_stride = width_;
    linear.x_scale = static_cast<const float*>(scale_.const_data_ptr());
    linear.x_sum = static_cast<const int32_t*>(sum_.const_data_ptr());
    return linear;
  }

 private:
  int64_t width_;
  Tensor q_, scale_, sum_;
};

// Rows of floats as the kernels read them: x itself where its rows begin and end at whole units of
// 16 bytes, a padded copy otherwise. Rows of fp32 may lie anywhere.
class FloatInputOnDevice {
 public:
  FloatInputOnDevice(const Tensor& x, const Matrix& rows)
      : owner_(rows.owner), data_(rows.data), row_bytes_(rows.row_bytes) {
    constexpr int64_t kUnit = 16;
    const int64_t element = kFloatBytes[static_cast<int>(rows.type)];
    bytes_ = rows.type == FloatType::float32 ? rows.k * element : round_up(rows.k * element, kUnit);
    const bool begin_whole =
        reinterpret_cast<uintptr_t>(data_) % kUnit == 0 && (row_bytes_ % kUnit == 0 || rows.m == 1);
    if (rows.type == FloatType::float32 || (begin_whole && rows.k * element == bytes_)) return;
    const Tensor matrix = torch::stable::reshape(x, {rows.m, rows.k});
    const int64_t padding = bytes_ / element - rows.k;
    owner_ = padding > 0 ? torch::stable::pad(matrix, {0, padding}) : torch::stable::clone(matrix);
    data_ = static_cast<const char*>(owner_.const_data_ptr());
    row_bytes_ = bytes_;
  }

  // `bytes`: of a row, padded.
  const int8_t* data() const { return reinterpret_cast<const int8_t*>(data_); }
  int64_t row_bytes() const { return row_bytes_; }
  int64_t bytes() const { return bytes_; }

 private:
  Tensor owner_;
  const char* data_;
  int64_t row_bytes_, bytes_;
};

inline void check_same_device(const char* op, const Tensor& x,
                              std::initializer_list<const Tensor*> others) {
  for (const Tensor* other : others)
    check(other->is_cuda() && other->get_device_index() == x.get_device_index(), op,
          ": all tensors must be on one device");
}

// Rows must begin at multiples of 16 bytes, as torch's own memory does; a view may not.
inline Tensor aligned_rows(const Tensor& packed, const char* op,
                           const char* name = "packed_weight") {
  const Tensor rows = torch::stable::contiguous(packed);
  check(reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0, op, ": ", name,
        " must begin at a multiple of 16 bytes; clone it");
  return rows;
}

inline void set_bias(DeviceLinear& linear, const Tensor& bias, const char* op) {
  check(bias.dim() == 1 && bias.size(0) == linear.n, op, ": bias must have shape [", linear.n,
        "], one value per output feature");
  linear.bias_type = float_type(bias, op, "bias");
  linear.bias = bias.const_data_ptr();
}

}  // namespace trine
