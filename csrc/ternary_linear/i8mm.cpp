// Ternary codes on Arm's matrix instructions, see codes_arm.h. Pairs of packed rows are interleaved
// before they are decoded.
#include "common/arm/gemm_i8mm.h"
#include "ternary_linear/codes_arm.h"

namespace trine {

void ternary_linear_i8mm(const QuantizedRows& x, const TernaryWeight& weight,
                         const LinearOutput& out, const Tile& tile) {
  if (weight.group_size != 0) return grouped_codes_linear(x, weight, out, tile);
  i8mm_linear(x, TernaryCodes{weight.packed, weight.stride}, weight.k,
              {weight.scale, weight.per_tensor}, out, tile);
}

}  // namespace trine
