// What rms_norm_quantize_rows checks alike on every device. Only torch*.cpp files include this.
#pragma once

#include "common/torch_linear.h"
#include "rms_norm_quantize_rows/rms_norm_quantize_rows.h"

namespace trine {

inline Matrix read_rows_to_norm(const char* op, const Tensor& x,
                                const std::optional<Tensor>& weight) {
  const Matrix rows = as_matrix(x, op, "x", kQuantizeRowsMaxK);
  check(!weight.has_value() || (weight->dim() == 1 && weight->size(0) == rows.k), op,
        ": weight must have shape [", rows.k, "], one value per column of x");
  return rows;
}

}  // namespace trine
