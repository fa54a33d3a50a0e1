// vpdpbusd on 64 codes: see streams.h and lanes.h.
#include "ternary_linear/few_or_many.h"
#include "ternary_linear/vectors_avx512vnni.h"

namespace trine {

void ternary_linear_avx512vnni(const QuantizedRows& x, const TernaryWeight& weight,
                               const LinearOutput& out, const Tile& tile) {
  linear_by_simd<Vectors512>(x, weight, out, tile);
}

}  // namespace trine
