// What every vector kernel of grouped weights needs: the sums of the activations over each group,
// and from float totals to outputs.
#pragma once

#include "common/linear.h"
#include "ternary_linear/ternary_linear.h"

namespace trine {
namespace {

// sums[m - m_begin][g] = the sum of row m of x over group g.
[[maybe_unused]] inline void sum_groups(const QuantizedRows& x, int64_t group_size, int64_t groups,
                                        const Tile& tile, int32_t* sums) {
  for (int64_t m = tile.m_begin; m < tile.m_end; ++m)
    for (int64_t g = 0; g < groups; ++g) {
      const int8_t* q = x.q + m * x.stride + g * group_size;
      int32_t sum = 0;
      for (int64_t k = 0; k < group_size; ++k) sum += q[k];
      *sums++ = sum;
    }
}

template <class T>
void finish_grouped_row(const float* totals, float x_scale, const float* bias, int64_t count,
                        T* y) {
  for (int64_t j = 0; j < count; ++j) {
    const float value = totals[j] * x_scale;
    narrow(bias == nullptr ? value : value + bias[j], y + j);
  }
}

// y[m][n..n + count) from their totals over all groups.
[[maybe_unused]] inline void finish_groups(const float* totals, float x_scale,
                                           const LinearOutput& out, int64_t m, int64_t n,
                                           int64_t count) {
  const float* bias = out.bias == nullptr ? nullptr : out.bias + n;
  const int64_t at = m * out.stride + n;
  switch (out.type) {
    case FloatType::float32:
      return finish_grouped_row(totals, x_scale, bias, count, static_cast<float*>(out.y) + at);
    case FloatType::bfloat16:
      return finish_grouped_row(totals, x_scale, bias, count, static_cast<bfloat16*>(out.y) + at);
    case FloatType::float16:
      return finish_grouped_row(totals, x_scale, bias, count, static_cast<float16*>(out.y) + at);
  }
}

}  // namespace
}  // namespace trine
