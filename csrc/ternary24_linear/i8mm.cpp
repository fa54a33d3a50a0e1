// 2:4-sparse ternary codes on Arm's matrix instructions, see codes_arm.h.
#include "common/arm/gemm_i8mm.h"
#include "ternary24_linear/codes_arm.h"

namespace trine {

void ternary24_linear_i8mm(const QuantizedRows& x, const Ternary24Weight& weight,
                           const LinearOutput& out, const Tile& tile) {
  i8mm_linear(x, Ternary24Codes{weight.packed, weight.stride, weight.k}, weight.k,
              {weight.scale, weight.per_tensor}, out, tile);
}

}  // namespace trine
