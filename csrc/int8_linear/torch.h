// What int8_linear checks alike on every device. Only torch*.cpp files include this.
#pragma once

#include <cmath>

#include "common/torch_linear.h"
#include "int8_linear/int8_linear.h"

namespace trine {

// The packed width of a row, if a weight of int8 fits rows of `k` columns.
inline int64_t check_packed_int8(const char* op, int64_t k, const Tensor& packed_weight) {
  check_dtype(packed_weight, ScalarType::Char, "int8", op, "packed_weight");
  check(packed_weight.dim() == 2, op, ": packed_weight must be [N, 16 * ceil(K / 16)]");
  const int64_t packed_k = round_up(k, kInt8Chunk);
  check(packed_weight.size(1) == packed_k, op, ": x has K = ", k,
        " columns, which needs a packed_weight of ", packed_k, " columns; it has ",
        packed_weight.size(1));
  return packed_k;
}

// The same, if there is one scale for each of its rows, too.
inline int64_t check_int8_weight(const char* op, int64_t k, const Tensor& packed_weight,
                                 const Tensor& weight_scale) {
  const int64_t packed_k = check_packed_int8(op, k, packed_weight), n = packed_weight.size(0);
  check_dtype(weight_scale, ScalarType::Float, "float32", op, "weight_scale");
  check(weight_scale.dim() == 1 && weight_scale.size(0) == n, op, ": weight_scale must be [", n,
        "], one scale per row of packed_weight");
  return packed_k;
}

// The shapes and dtypes of static activations; their values are the kernel's business.
inline void check_static_input(const char* op, const std::optional<Tensor>& scale,
                               const std::optional<Tensor>& zero_point) {
  if (!scale.has_value()) {
    check(!zero_point.has_value(), op, ": input_zero_point needs input_scale beside it");
    return;
  }
  check(scale->numel() == 1, op, ": input_scale must hold one value for the whole tensor");
  check_dtype(*scale, ScalarType::Float, "float32", op, "input_scale");
  if (!zero_point.has_value()) return;
  check(zero_point->numel() == 1, op, ": input_zero_point must hold one value");
  check_dtype(*zero_point, ScalarType::Int, "int32", op, "input_zero_point");
}

// The values, which lie on the CPU.
inline std::optional<StaticInput> read_static_input(const char* op,
                                                    const std::optional<Tensor>& scale,
                                                    const std::optional<Tensor>& zero_point) {
  check_static_input(op, scale, zero_point);
  if (!scale.has_value()) return std::nullopt;
  StaticInput fixed{*static_cast<const float*>(scale->const_data_ptr()), 0};
  check(fixed.scale > 0.0f && std::isfinite(fixed.scale), op,
        ": input_scale must be positive and finite, it is ", fixed.scale);
  if (zero_point.has_value()) {
    fixed.zero_point = *static_cast<const int32_t*>(zero_point->const_data_ptr());
    check(fixed.zero_point >= -128 && fixed.zero_point <= 127, op,
          ": input_zero_point must lie in [-128, 127], it is ", fixed.zero_point);
  }
  return fixed;
}

}  // namespace trine
