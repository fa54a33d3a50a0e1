// What every integer linear kernel on a GPU is given. All pointers are to the device's memory.
//
//   y[m][n] = narrow(activated(((float(acc) * x_scale[m]) * weight_scale[n]) + bias[n]))
//   acc     = sum over k of q[m][k] * w[n][k], exact in int32, less column_minus[n]
//
// with one rounding at each step, as on the CPU.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/cuda/stream.h"
#include "common/float_types.h"

namespace trine {

struct DeviceLinear {
  int64_t m, n;
  const int8_t* q;   // [m], zero from k to q_stride
  int64_t q_stride;  // bytes from row to row, a multiple of kActivationAlignment
  const float* x_scale;
  const int32_t* x_sum;  // of each row's q
  const uint8_t* weight;
  int64_t weight_stride;  // bytes from row to row, a multiple of 16; the end of a row is padding
  const float* weight_scale;  // [n] or, if per_tensor, one value
  bool per_tensor;
  const int32_t* column_minus;  // [n] or null
  const void* bias;             // [n] of bias_type, or null
  FloatType bias_type;
  void* y;  // [m][n] of type
  FloatType type;
  Activation activation;
};

// A tile of the copy engine is 128 bytes wide; zeros to the end of the last one spare every kernel
// the question where k ends.
inline constexpr int64_t kActivationAlignment = 128;

}  // namespace trine
