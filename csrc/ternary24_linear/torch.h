// What ternary24_linear checks alike on every device. Only torch*.cpp files include this.
#pragma once

#include "common/torch_linear.h"
#include "ternary24_linear/ternary24_linear.h"

namespace trine {

// The number of rows of a packed weight that fits x of `k` columns.
inline int64_t check_ternary24_weight(const char* op, int64_t k, const Tensor& packed_weight,
                                      const Tensor& weight_scale) {
  check_dtype(packed_weight, ScalarType::Byte, "uint8", op, "packed_weight");
  check_dtype(weight_scale, ScalarType::Float, "float32", op, "weight_scale");
  check(packed_weight.dim() == 2, op,
        ": packed_weight must be [N, 16 * ceil(6 * ceil(K / 4) / 128)]");
  const int64_t n = packed_weight.size(0), bytes = ternary24_row_bytes(k);
  check(packed_weight.size(1) == bytes, op, ": x has K = ", k,
        " columns, which needs a packed_weight of ", bytes, " columns; it has ",
        packed_weight.size(1));
  check(weight_scale.dim() <= 1 && (weight_scale.numel() == 1 || weight_scale.numel() == n), op,
        ": weight_scale must hold one value or [", n, "] (one per row of packed_weight)");
  return n;
}

}  // namespace trine
