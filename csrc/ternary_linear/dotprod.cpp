// Ternary codes on Arm's dot products, see codes_arm.h.
#include "ternary_linear/codes_arm.h"

namespace trine {

void ternary_linear_dotprod(const QuantizedRows& x, const TernaryWeight& weight,
                            const LinearOutput& out, const Tile& tile) {
  if (weight.group_size != 0) return grouped_codes_linear(x, weight, out, tile);
  dotprod_linear(x, TernaryCodes{weight.packed, weight.stride}, weight.k,
                 {weight.scale, weight.per_tensor}, out, tile);
}

}  // namespace trine
