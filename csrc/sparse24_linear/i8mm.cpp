// Int8 values on Arm's matrix instructions, see int8_values_arm.h.
#include "common/arm/gemm_i8mm.h"
#include "sparse24_linear/int8_values_arm.h"

namespace trine {

void sparse24_int8_i8mm(const QuantizedRows& x, const Sparse24Int8Weight& weight,
                        const LinearOutput& out, const Tile& tile) {
  i8mm_linear(x, SparseWeight{weight}, weight.chunks * kSparse24Columns, {weight.scale}, out, tile);
}

}  // namespace trine
