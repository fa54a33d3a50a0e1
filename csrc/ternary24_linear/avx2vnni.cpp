// AVX2-VNNI: see by_panel.h.
#include "ternary24_linear/by_panel.h"
#include "ternary_linear/few_or_many.h"
#include "ternary_linear/vectors_avx2vnni.h"

namespace trine {

void ternary24_linear_avx2vnni(const QuantizedRows& x, const Ternary24Weight& weight,
                               const LinearOutput& out, const Tile& tile) {
  linear_by_panel(linear_by_simd<VnniVectors256>, x, weight, out, tile);
}

}  // namespace trine
