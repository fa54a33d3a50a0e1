// Ternary codes on Arm's matrix instructions, see codes_arm.h; packed rows are interleaved before
// they are decoded. Groups take dot products: their cost is in starting and finishing tiles.
#include "common/arm/gemm_i8mm.h"
#include "ternary_linear/codes_arm.h"
#include "ternary_linear/grouped.h"

namespace trine {

void ternary_linear_i8mm(const QuantizedRows& x, const TernaryWeight& weight,
                         const LinearOutput& out, const Tile& tile) {
  if (weight.group_size != 0) return grouped_linear<TernaryCodes>(x, weight, out, tile);
  i8mm_linear(x, TernaryCodes{weight.packed, weight.stride}, weight.k,
              {weight.scale, weight.per_tensor}, out, tile);
}

}  // namespace trine
