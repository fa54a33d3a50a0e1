// INT8 on AVX2-VNNI: the packed rows are read as they lie, see gemm_avx2vnni.h.
#include "common/x86/gemm_avx2vnni.h"
#include "int8_linear/tile.h"

namespace trine {

void int8_linear_avx2vnni(const QuantizedRows& x, int32_t input_zero_point,
                          const Int8Weight& weight, const LinearOutput& out, const Tile& tile) {
  int8_linear_tile<PackedInt8Weight>(x, input_zero_point, weight, out, tile);
}

}  // namespace trine
