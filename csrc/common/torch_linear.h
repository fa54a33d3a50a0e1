// What the torch.cpp files of the linear ops share: reading tensors, quantising the input, cutting
// the output into tiles for the threads. Only torch.cpp files include this.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/linear.h"
#include "common/scratch.h"
#include "quantize_rows/quantize_rows.h"

namespace trine {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline FloatType float_type(ScalarType type, const char* op, const char* name) {
  switch (type) {
    case ScalarType::Float:
      return FloatType::float32;
    case ScalarType::BFloat16:
      return FloatType::bfloat16;
    case ScalarType::Half:
      return FloatType::float16;
    default:
      check(false, op, ": ", name, " must be float32, bfloat16 or float16, it is ",
            torch::headeronly::toString(type), "; convert it with .to()");
      return FloatType::float32;
  }
}

inline FloatType float_type(const Tensor& tensor, const char* op, const char* name) {
  return float_type(tensor.scalar_type(), op, name);
}

inline void check_dtype(const Tensor& tensor, ScalarType dtype, const char* dtype_name,
                        const char* op, const char* name) {
  check(tensor.scalar_type() == dtype, op, ": ", name, " must be ", dtype_name,
        "; pack the weight again with trine.ops, or load the checkpoint without changing dtypes");
}

// torch::stable::contiguous and new_empty look their operators up by name, 0.4 us each: as much as
// a small layer takes.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Uninitialised, on x's device; without a dtype, of x's.
inline Tensor new_tensor(const Tensor& x, const std::vector<int64_t>& shape,
                         std::optional<ScalarType> dtype = {}) {
  int32_t type = dtype.has_value() ? static_cast<int32_t>(*dtype) : 0;
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(
      x.get(), shape.data(), static_cast<int64_t>(shape.size()),
      dtype.has_value() ? &type : nullptr, nullptr, nullptr, 0, nullptr, &made));
  return Tensor(made);
}

// A floating tensor [..., k] read as a matrix [m, k] whose rows are contiguous.
struct Matrix {
  Tensor owner;  // keeps `data` alive where a copy had to be made
  const char* data;
  int64_t m, k;
  int64_t row_bytes;
  FloatType type;

  const void* row(int64_t i) const { return data + i * row_bytes; }
};

inline void check_k(int64_t k, int64_t max_k, const char* op) {
  check(k <= max_k, op, ": K = ", k, " exceeds ", max_k,
        ", beyond which int32 sums could overflow");
}

// Copies only where one row stride cannot describe the tensor, and not before it is checked.
inline Matrix as_matrix(const Tensor& x, const char* op, const char* name,
                        int64_t max_k = std::numeric_limits<int64_t>::max()) {
  const FloatType type = float_type(x, op, name);
  const int64_t dim = x.dim();
  check(dim >= 1, op, ": ", name, " must have at least one dimension, [..., K]; it is a scalar");
  const int64_t k = x.size(dim - 1);
  check_k(k, max_k, op);
  int64_t m = 1;
  for (int64_t d = 0; d + 1 < dim; ++d) m *= x.size(d);

  const bool strided_rows = dim == 2 && (x.stride(1) == 1 || k <= 1) && x.stride(0) >= k;
  const Tensor owner = strided_rows ? x : as_contiguous(x);
  const int64_t row_stride = strided_rows ? x.stride(0) : k;
  return {owner, static_cast<const char*>(owner.const_data_ptr()), m,
          k,     row_stride * kFloatBytes[static_cast<int>(type)], type};
}

// What quantize_rows gives, for ops that take it in place of x.
struct RowTensors {
  Tensor q, scale, sum;
  int64_t m, k;

  int8_t* q_data() const { return static_cast<int8_t*>(q.mutable_data_ptr()); }
  float* scale_data() const { return static_cast<float*>(scale.mutable_data_ptr()); }
  int32_t* sum_data() const { return static_cast<int32_t*>(sum.mutable_data_ptr()); }
};

inline RowTensors new_quantized_rows(const Tensor& x, const Matrix& rows) {
  return {new_tensor(x, {rows.m, rows.k}, ScalarType::Char),
          new_tensor(x, {rows.m}, ScalarType::Float), new_tensor(x, {rows.m}, ScalarType::Int),
          rows.m, rows.k};
}

inline RowTensors read_quantized_rows(const Tensor& q, const Tensor& scale, const Tensor& sum,
                                      const char* op, int64_t max_k) {
  check(q.dim() == 2 && q.scalar_type() == ScalarType::Char, op, ": q must be int8 [M, K]");
  const int64_t m = q.size(0), k = q.size(1);
  check(scale.dim() == 1 && scale.size(0) == m && scale.scalar_type() == ScalarType::Float, op,
        ": scale must be float32 [", m, "], one value per row of q");
  check(sum.dim() == 1 && sum.size(0) == m && sum.scalar_type() == ScalarType::Int, op,
        ": sum must be int32 [", m, "], one value per row of q");
  check_k(k, max_k, op);
  return {as_contiguous(q), as_contiguous(scale), as_contiguous(sum), m, k};
}

// What a linear op multiplies, and the shape and type of the result.
struct LinearShape {
  std::vector<int64_t> sizes;  // [..., k]
  int64_t m, k;
  ScalarType dtype;
  FloatType type;

  Tensor new_output(const Tensor& like, int64_t n) const {
    std::vector<int64_t> shape = sizes;
    shape.back() = n;
    return new_tensor(like, shape, dtype);
  }
};

inline LinearShape linear_shape(const Tensor& x, const Matrix& rows) {
  return {{x.sizes().begin(), x.sizes().end()}, rows.m, rows.k, x.scalar_type(), rows.type};
}

inline LinearShape linear_shape(const RowTensors& rows, ScalarType dtype, const char* op) {
  return {{rows.m, rows.k}, rows.m, rows.k, dtype, float_type(dtype, op, "dtype")};
}

// A small floating tensor (bias, scales) as float32, copied only where it must be widened.
class Float32Vector {
 public:
  Float32Vector(const Tensor& tensor, const char* op, const char* name)
      : owner_(as_contiguous(tensor)) {
    const FloatType type = float_type(owner_, op, name);
    if (type == FloatType::float32) {
      data_ = static_cast<const float*>(owner_.const_data_ptr());
      return;
    }
    const int64_t count = owner_.numel();
    storage_.emplace(count * int64_t(sizeof(float)));
    float* widened = storage_->data<float>();
    if (type == FloatType::bfloat16)
      widen_all(static_cast<const bfloat16*>(owner_.const_data_ptr()), count, widened);
    else
      widen_all(static_cast<const float16*>(owner_.const_data_ptr()), count, widened);
    data_ = widened;
  }

  const float* data() const { return data_; }

 private:
  template <class T>
  static void widen_all(const T* values, int64_t count, float* widened) {
    for (int64_t i = 0; i < count; ++i) widened[i] = widen(values[i]);
  }

  Tensor owner_;
  std::optional<Scratch> storage_;
  const float* data_;
};

inline std::optional<Float32Vector> read_bias(const std::optional<Tensor>& bias, int64_t n,
                                              const char* op) {
  if (!bias.has_value()) return std::nullopt;
  check(bias->dim() == 1 && bias->size(0) == n, op, ": bias must have shape [", n,
        "], one value per output feature");
  return std::make_optional<Float32Vector>(*bias, op, "bias");
}

// The schemas' `int activation`: its place in Activation.
inline Activation read_activation(int64_t activation, const char* op) {
  check(activation >= 0 && activation <= static_cast<int64_t>(Activation::gelu_tanh), op,
        ": activation must be 0 (none), 1 (relu), 2 (gelu) or 3 (gelu_tanh), it is ", activation);
  return static_cast<Activation>(activation);
}

// Static activation quantisation: one scale and zero point for the whole tensor.
struct StaticInput {
  float scale;
  int32_t zero_point;
};

// The rows of `x` as int8 in scratch memory, zero-padded to a multiple of `k_multiple` (itself a
// multiple of 64).
class QuantizedInput {
 public:
  QuantizedInput(const Matrix& x, int64_t k_multiple, std::optional<StaticInput> fixed = {})
      : stride_(row_stride(std::max(round_up(x.k, k_multiple), k_multiple), k_multiple)),
        storage_(x.m * (stride_ + int64_t(sizeof(float) + sizeof(int32_t)))) {
    int8_t* q = storage_.data<int8_t>();
    float* scale = reinterpret_cast<float*>(q + x.m * stride_);
    int32_t* sum = reinterpret_cast<int32_t*>(scale + x.m);
    const QuantizeRowsKernel& kernel = quantize_rows_kernel();
    // A thread is worth waking for some 32k values (measured: about 5 us of work).
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(x.k, 1));
    torch::stable::parallel_for(0, x.m, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        int8_t* row = q + i * stride_;
        if (fixed.has_value())
          kernel.static_row(x.row(i), x.type, x.k, fixed->scale, fixed->zero_point, row, scale + i,
                            sum + i);
        else
          kernel.dynamic_row(x.row(i), x.type, x.k, row, scale + i, sum + i);
        std::fill(row + x.k, row + stride_, int8_t{0});
      }
    });
    rows_ = {q, stride_, scale, sum};
  }

  // Rows that were quantised before. `x` must outlive this.
  QuantizedInput(const RowTensors& x, int64_t k_multiple)
      : stride_(row_stride(std::max(round_up(x.k, k_multiple), k_multiple), k_multiple)),
        storage_(x.m * stride_) {
    const auto* from = static_cast<const int8_t*>(x.q.const_data_ptr());
    int8_t* q = storage_.data<int8_t>();
    for (int64_t i = 0; i < x.m; ++i) {
      std::copy_n(from + i * x.k, x.k, q + i * stride_);
      std::fill(q + i * stride_ + x.k, q + (i + 1) * stride_, int8_t{0});
    }
    rows_ = {q, stride_, static_cast<const float*>(x.scale.const_data_ptr()),
             static_cast<const int32_t*>(x.sum.const_data_ptr())};
  }

  const QuantizedRows& rows() const { return rows_; }

 private:
  // The sets of an L1 repeat every 4096 bytes. Rows nearly a multiple of that apart would lie in
  // the same sets, where only a slice of k is in use; 512 bytes beyond it eight slices of any
  // length fill all sets alike (8 rows of K = 4096: 1.5 times as fast). Other multiples of 512
  // bytes would share few sets, with each other and with the weight rows, which are apart as far.
  static int64_t row_stride(int64_t bytes, int64_t k_multiple) {
    if (bytes > 3584 && (bytes + 511) % 4096 < 1023) return round_up(bytes - 512, 4096) + 512;
    return bytes % 512 == 0 ? bytes + k_multiple : bytes;
  }

  int64_t stride_;
  Scratch storage_;
  QuantizedRows rows_;
};

// Runs `run(Tile)` over all of [0, m) x [0, n), cut along the side that gives the threads even
// work. Where the cuts fall never changes a result: each output is computed whole by one thread.
template <class Run>
void parallel_tiles(int64_t m, int64_t n, int64_t k, const Run& run) {
  // A thread is worth waking for some 256k multiplications (about 5 us at M = 1 from DRAM).
  constexpr int64_t kWorthAThread = 1 << 18;
  // 16 outputs are a cache line of fp32: threads do not write into each other's lines.
  constexpr int64_t kBlock = 16;
  if (m == 0 || n == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  const bool cut_columns = n >= kBlock * threads || n >= m;
  const int64_t length = cut_columns ? n : m;
  const int64_t block = cut_columns ? kBlock : 1;
  const int64_t blocks = (length + block - 1) / block;
  const int64_t work_per_block = std::max<int64_t>(1, block * k * (cut_columns ? m : n));
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / work_per_block);
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * block, to = std::min(end * block, length);
    run(cut_columns ? Tile{0, m, from, to} : Tile{from, to, 0, n});
  });
}

}  // namespace trine
