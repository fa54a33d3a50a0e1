#include "int8_linear/int8_linear.h"

#include "common/store.h"

namespace trine {

void int8_linear_scalar(const QuantizedRows& x, int32_t input_zero_point, const Int8Weight& weight,
                        const LinearOutput& out, const Tile& tile) {
  for (int64_t n = tile.n_begin; n < tile.n_end; ++n) {
    const int8_t* w = weight.packed + n * weight.stride;
    int32_t weight_sum = 0;
    for (int64_t k = 0; k < weight.k; ++k) weight_sum += w[k];
    for (int64_t m = tile.m_begin; m < tile.m_end; ++m) {
      const int8_t* q = x.q + m * x.stride;
      int32_t acc = 0;
      for (int64_t k = 0; k < weight.k; ++k) acc += int32_t{q[k]} * w[k];
      acc -= input_zero_point * weight_sum;
      store(out, m, n, (static_cast<float>(acc) * x.scale[m]) * weight.scale[n]);
    }
  }
}

}  // namespace trine
