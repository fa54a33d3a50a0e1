// What every vector kernel of grouped weights needs: the sums of the activations over each group,
// and from float totals to outputs.
#pragma once

#include <algorithm>

#include "common/activate_all.h"
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
void finish_grouped_row(const float* totals, float x_scale, const float* bias,
                        Activation activation, int64_t count, T* y) {
  const auto value = [&](int64_t j) {
    const float scaled = totals[j] * x_scale;
    return bias == nullptr ? scaled : scaled + bias[j];
  };
  if (activation == Activation::none) {
    for (int64_t j = 0; j < count; ++j) narrow(value(j), y + j);
    return;
  }
  constexpr int64_t kAtATime = 64;
  float values[kAtATime];
  for (int64_t first = 0; first < count; first += kAtATime) {
    const int64_t some = std::min(kAtATime, count - first);
    for (int64_t j = 0; j < some; ++j) values[j] = value(first + j);
    activate_all(activation, values, some);
    for (int64_t j = 0; j < some; ++j) narrow(values[j], y + first + j);
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
      return finish_grouped_row(totals, x_scale, bias, out.activation, count,
                                static_cast<float*>(out.y) + at);
    case FloatType::bfloat16:
      return finish_grouped_row(totals, x_scale, bias, out.activation, count,
                                static_cast<bfloat16*>(out.y) + at);
    case FloatType::float16:
      return finish_grouped_row(totals, x_scale, bias, out.activation, count,
                                static_cast<float16*>(out.y) + at);
  }
}

}  // namespace
}  // namespace trine
