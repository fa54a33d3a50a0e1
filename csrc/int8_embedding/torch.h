// What int8_embedding checks alike on every device. Only torch*.cpp files include this.
#pragma once

#include "common/torch_linear.h"
#include "int8_embedding/int8_embedding.h"
#include "int8_linear/int8_linear.h"

namespace trine {

inline constexpr const char* kInt8Embedding = "int8_embedding";

// Throws std::invalid_argument for what does not fit. Whether the indices are int64 (not int32).
inline bool check_int8_embedding(const Tensor& indices, const Tensor& packed_weight,
                                 const Tensor& weight_scale, int64_t dim) {
  const char* const op = kInt8Embedding;
  const ScalarType type = indices.scalar_type();
  check(type == ScalarType::Long || type == ScalarType::Int, op,
        ": indices must be int64 or int32, they are ", torch::headeronly::toString(type),
        "; convert them with .to()");
  check_dtype(packed_weight, ScalarType::Char, "int8", op, "packed_weight");
  check_dtype(weight_scale, ScalarType::Float, "float32", op, "weight_scale");
  check(dim >= 0 && packed_weight.dim() == 2 && packed_weight.size(1) == round_up(dim, kInt8Chunk),
        op, ": embedding_dim = ", dim, " needs a packed_weight [V, ", round_up(dim, kInt8Chunk),
        "]; pack the table with trine.ops.pack_int8");
  const int64_t v = packed_weight.size(0);
  check(weight_scale.dim() == 1 && weight_scale.size(0) == v, op, ": weight_scale must be [", v,
        "], one scale per row of packed_weight");
  return type == ScalarType::Long;
}

// [..., dim] of the dtype, for indices [...].
inline Tensor new_embedding(const Tensor& indices, int64_t dim, ScalarType dtype) {
  std::vector<int64_t> shape(indices.sizes().begin(), indices.sizes().end());
  shape.push_back(dim);
  return new_tensor(indices, shape, dtype);
}

}  // namespace trine
