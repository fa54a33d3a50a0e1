// What ternary_linear checks alike on every device. Only torch*.cpp files include this.
#pragma once

#include "common/groups.h"
#include "common/torch_linear.h"
#include "ternary_linear/ternary_linear.h"

namespace trine {

struct TernaryShape {
  int64_t n, words, group_size;  // words of a packed row; group_size 0: no groups
};

// The group size that the shape of `weight_scale` means, 0 for one scale per row or per tensor.
inline int64_t read_group_size(const char* op, const Tensor& weight_scale, int64_t n, int64_t k) {
  if (weight_scale.dim() == 2 && weight_scale.size(0) == n)
    return check_groups(op, weight_scale.size(1), k);
  const bool per_tensor = weight_scale.dim() <= 1 && weight_scale.numel() == 1;
  const bool per_row = weight_scale.dim() == 1 && weight_scale.size(0) == n;
  check(per_tensor || per_row, op, ": weight_scale must hold one value, [", n,
        "] (one per row of packed_weight) or [", n, ", groups]");
  return 0;
}

inline TernaryShape check_ternary_weight(const char* op, int64_t k, const Tensor& packed_weight,
                                         const Tensor& weight_scale) {
  check_dtype(packed_weight, ScalarType::Int, "int32", op, "packed_weight");
  check_dtype(weight_scale, ScalarType::Float, "float32", op, "weight_scale");
  check(packed_weight.dim() == 2, op, ": packed_weight must be [N, 4 * ceil(K / 64)]");
  const int64_t n = packed_weight.size(0);
  const int64_t words = round_up(k, kTernaryChunk) / kTernaryPerWord;
  check(packed_weight.size(1) == words, op, ": x has K = ", k,
        " columns, which needs a packed_weight of ", words, " columns; it has ",
        packed_weight.size(1));
  return {n, words, read_group_size(op, weight_scale, n, k)};
}

}  // namespace trine
