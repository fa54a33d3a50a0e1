// What sparse24_linear checks alike on every device. Only torch*.cpp files include this.
#pragma once

#include "common/torch_linear.h"
#include "sparse24_linear/sparse24_linear.h"

namespace trine {

// x as a matrix, if the weight and its scales fit it and each other.
inline Matrix check_sparse24(const char* op, const Tensor& x, const Tensor& values,
                             const Tensor& indices, const std::optional<Tensor>& weight_scale) {
  const bool int8 = values.scalar_type() == ScalarType::Char;
  const Matrix rows = int8 ? as_matrix(x, op, "x", kSparse24Int8MaxK) : as_matrix(x, op, "x");
  check(values.dim() == 2, op, ": values must be [N, 16 * ceil(K / 32)]");
  const int64_t n = values.size(0), chunks = (rows.k + kSparse24Columns - 1) / kSparse24Columns;
  check(values.size(1) == chunks * kSparse24Values, op, ": x has K = ", rows.k,
        " columns, which needs values of ", chunks * kSparse24Values, " columns; they have ",
        values.size(1));
  check_dtype(indices, ScalarType::Byte, "uint8", op, "indices");
  check(indices.dim() == 2 && indices.size(0) == n && indices.size(1) == chunks * kSparse24Indices,
        op, ": indices must be [", n, ", ", chunks * kSparse24Indices,
        "], four bytes for every 16 values");
  if (!int8) {
    float_type(values, op, "values (where not int8)");
    check(!weight_scale.has_value(), op,
          ": weight_scale goes with int8 values only; multiply float values by it instead");
    return rows;
  }
  check(weight_scale.has_value(), op, ": int8 values need a weight_scale of shape [", n, "]");
  check_dtype(*weight_scale, ScalarType::Float, "float32", op, "weight_scale");
  check(weight_scale->dim() == 1 && weight_scale->size(0) == n, op, ": weight_scale must be [", n,
        "], one scale per row of values");
  return rows;
}

}  // namespace trine
