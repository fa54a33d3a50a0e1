// INT8 on AVX-512 VNNI: the packed rows are read as they lie, see gemm_avx512vnni.h.
#include "common/x86/gemm_avx512vnni.h"
#include "int8_linear/int8_linear.h"

namespace trine {

void int8_linear_avx512vnni(const QuantizedRows& x, int32_t input_zero_point,
                            const Int8Weight& weight, const LinearOutput& out, const Tile& tile) {
  const PackedInt8Weight packed{weight.packed, weight.stride};
  if (input_zero_point == 0) return integer_linear(x, packed, weight.k, {weight.scale}, out, tile);
  const int64_t columns = tile.n_end - tile.n_begin;
  const Scratch minus(columns * int64_t(sizeof(int32_t)));
  sum_weight_rows(packed, weight.k, tile.n_begin, tile.n_end, minus.data<int32_t>());
  for (int64_t n = 0; n < columns; ++n) minus.data<int32_t>()[n] *= input_zero_point;
  integer_linear(x, packed, weight.k, {weight.scale, false, minus.data<int32_t>()}, out, tile);
}

}  // namespace trine
