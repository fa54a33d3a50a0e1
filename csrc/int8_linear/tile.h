// What the vector kernels share: a Tile of outputs, with the zero point of static activations.
//
//   sum over k of (q - zero_point) * w = acc - zero_point * (sum over k of w)
//
// The row sums of the weight are taken only where the zero point is not zero; they cost as much as
// one more row of activations.
#pragma once

#include "common/gemm_blocking.h"
#include "int8_linear/int8_linear.h"

namespace trine {
namespace {

template <class PackedWeight>
void int8_linear_tile(const QuantizedRows& x, int32_t input_zero_point, const Int8Weight& weight,
                      const LinearOutput& out, const Tile& tile) {
  const PackedWeight packed{weight.packed, weight.stride};
  if (input_zero_point == 0) return integer_linear(x, packed, weight.k, {weight.scale}, out, tile);
  const int64_t columns = tile.n_end - tile.n_begin;
  const Scratch storage(columns * int64_t(sizeof(int32_t)));
  int32_t* minus = storage.data<int32_t>();
  sum_weight_rows(packed, weight.k, tile.n_begin, tile.n_end, minus);
  for (int64_t n = 0; n < columns; ++n) minus[n] *= input_zero_point;
  integer_linear(x, packed, weight.k, {weight.scale, false, minus}, out, tile);
}

}  // namespace
}  // namespace trine
