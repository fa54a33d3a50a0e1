// What int8_weight_linear checks alike on every device. Only torch*.cpp files include this.
#pragma once

#include "common/groups.h"
#include "int8_linear/torch.h"
#include "int8_weight_linear/int8_weight_linear.h"

namespace trine {

struct Int8WeightShape {
  int64_t n, packed_k, groups;  // groups: 1 for one scale per row
};

inline Int8WeightShape check_int8_weight_only(const char* op, int64_t k,
                                              const Tensor& packed_weight,
                                              const Tensor& weight_scale) {
  const int64_t packed_k = check_packed_int8(op, k, packed_weight), n = packed_weight.size(0);
  check_dtype(weight_scale, ScalarType::Float, "float32", op, "weight_scale");
  const bool grouped = weight_scale.dim() == 2;
  check((grouped || weight_scale.dim() == 1) && weight_scale.size(0) == n, op,
        ": weight_scale must be [", n, "] (one per row of packed_weight) or [", n, ", groups]");
  if (grouped) check_groups(op, weight_scale.size(1), k);
  return {n, packed_k, grouped ? weight_scale.size(1) : 1};
}

}  // namespace trine
