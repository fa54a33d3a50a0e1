// The outer loop of the integer products: a Tile of y from int8 activations and a weight, cut into
// blocks of weight rows that stay in L2 while activations pass. It serves every instruction set:
// include it through gemm_avx512vnni.h and its like, whose first comment says how a kernel uses it.
#pragma once

#include "common/gemm_few_rows.h"
#include "common/gemm_many_rows.h"

namespace trine {
namespace {

// Computes the outputs of `tile`. `k` is the true number of columns.
template <class Weight>
void integer_linear(const QuantizedRows& x, const Weight& weight, int64_t k, const Scaling& scaling,
                    const LinearOutput& out, const Tile& tile) {
  if constexpr (requires { typename Weight::ManyRows; })
    if (tile.m_end - tile.m_begin >= Weight::kManyRows)
      return many_rows_linear(x, weight, k, scaling, out, tile);
  if constexpr (requires { weight.row(tile.n_begin); })
    if (tile.m_end - tile.m_begin <= streamed_rows<Weight>())
      return streamed_linear(x, weight, k, scaling, out, tile);
  few_rows_linear(x, weight, k, scaling, out, tile);
}

}  // namespace
}  // namespace trine
