// What the linear kernels share: their view of the activations, and of where the results go.
//
// Every integer kernel computes, in this order and with one rounding at each step,
//   y[m][n] = narrow(activated(((float(acc) * x.scale[m]) * weight_scale[n]) + bias[n]))
// so that all of them give the same bits; `activated` is the identity where an op has none.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/float_types.h"

namespace trine {

namespace {  // kernel files include this: see float_types.h

[[maybe_unused]] inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace

// Rows of int8 activations. Each row starts on a 64-byte boundary and is zero from k to `stride`.
struct QuantizedRows {
  const int8_t* q;
  int64_t stride;      // bytes from row to row, a multiple of 64
  const float* scale;  // of each row; NaN marks a row that held NaN or infinity (its q are 0)
  const int32_t* sum;  // of each row's q
};

struct LinearOutput {
  void* y;
  int64_t stride;  // elements from row to row
  FloatType type;
  const float* bias;  // [n], or null
  Activation activation = Activation::none;
};

// The part of the result that one call of a kernel computes.
struct Tile {
  int64_t m_begin, m_end, n_begin, n_end;
};

}  // namespace trine
