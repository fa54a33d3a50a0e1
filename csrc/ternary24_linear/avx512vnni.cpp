// AVX-512 VNNI without VBMI (Cascade Lake): see by_panel.h.
#include "ternary24_linear/by_panel.h"

namespace trine {

void ternary24_linear_avx512vnni(const QuantizedRows& x, const Ternary24Weight& weight,
                                 const LinearOutput& out, const Tile& tile) {
  linear_by_panel(ternary_linear_avx512vnni, x, weight, out, tile);
}

}  // namespace trine
