// vpdpbusd on 32 codes: see streams.h and lanes.h.
#include "ternary_linear/few_or_many.h"
#include "ternary_linear/vectors_avx2vnni.h"

namespace trine {

void ternary_linear_avx2vnni(const QuantizedRows& x, const TernaryWeight& weight,
                             const LinearOutput& out, const Tile& tile) {
  linear_by_simd<VnniVectors256>(x, weight, out, tile);
}

}  // namespace trine
