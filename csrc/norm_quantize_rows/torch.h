// What the norms check alike on every device. Only torch*.cpp files include this.
#pragma once

#include "common/torch_linear.h"
#include "norm_quantize_rows/norm_quantize_rows.h"

namespace trine {

using OptionalTensor = std::optional<Tensor>;

// The operators, and the names that errors give them.
inline constexpr const char* kRmsNorm = "rms_norm_quantize_rows";
inline constexpr const char* kLayerNorm = "layer_norm_quantize_rows";

inline Matrix read_rows_to_norm(const char* op, const Tensor& x, const OptionalTensor& weight,
                                const OptionalTensor& bias) {
  const Matrix rows = as_matrix(x, op, "x", kQuantizeRowsMaxK);
  const auto check_length = [&](const OptionalTensor& values, const char* name) {
    check(!values.has_value() || (values->dim() == 1 && values->size(0) == rows.k), op, ": ", name,
          " must have shape [", rows.k, "], one value per column of x");
  };
  check_length(weight, "weight");
  check_length(bias, "bias");
  return rows;
}

}  // namespace trine
