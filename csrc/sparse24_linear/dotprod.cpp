// Int8 values on Arm's dot products, see int8_values_arm.h.
#include "sparse24_linear/int8_values_arm.h"

namespace trine {

void sparse24_int8_dotprod(const QuantizedRows& x, const Sparse24Int8Weight& weight,
                           const LinearOutput& out, const Tile& tile) {
  dotprod_linear(x, SparseWeight{weight}, weight.chunks * kSparse24Columns, {weight.scale}, out,
                 tile);
}

}  // namespace trine
