// 2:4-sparse ternary codes on Arm's dot products, see codes_arm.h.
#include "ternary24_linear/codes_arm.h"

namespace trine {

void ternary24_linear_dotprod(const QuantizedRows& x, const Ternary24Weight& weight,
                              const LinearOutput& out, const Tile& tile) {
  dotprod_linear(x, Ternary24Codes{weight.packed, weight.stride, weight.k}, weight.k,
                 {weight.scale, weight.per_tensor}, out, tile);
}

}  // namespace trine
