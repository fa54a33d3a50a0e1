// Int8 quantisation of activations, one row at a time, in fp32 after widening x.
//
// Dynamic (symmetric absmax):
//   scale = absmax / 127,  q[k] = clamp(rint(x[k] * (127 / absmax)), -127, 127)
// with rint half to even. A row with absmax < 2^-120 (127 / absmax could overflow) counts as zero:
// scale 0, q 0. A row that holds NaN or infinity gets scale NaN and q 0, so that a linear layer
// returns NaN for it and never garbage.
//
// Static (one scale and zero point for the tensor, both given):
//   q[k] = clamp(rint(x[k] / scale) + zero_point, -128, 127)
// as ONNX's QuantizeLinear; the row's scale is the given one, or NaN for a row that holds NaN or
// infinity.
//
// sum is the sum of the row's q.
#pragma once

#include <cstdint>
#include <limits>

#include "common/float_types.h"
#include "common/isa.h"

namespace trine {

inline constexpr float kSmallestAbsmax = 0x1p-120f;
// The sum of 127 * k must stay below 2^31.
inline constexpr int64_t kQuantizeRowsMaxK = std::numeric_limits<int32_t>::max() / 127;

using QuantizeRowFn = void(const void* x, FloatType type, int64_t k, int8_t* q, float* scale,
                           int32_t* sum);
using QuantizeRowStaticFn = void(const void* x, FloatType type, int64_t k, float input_scale,
                                 int32_t input_zero_point, int8_t* q, float* scale, int32_t* sum);

struct QuantizeRowsKernel {
  Isa needs;
  QuantizeRowFn* dynamic_row;
  QuantizeRowStaticFn* static_row;
};

QuantizeRowFn quantize_row_scalar, quantize_row_avx2, quantize_row_avx512, quantize_row_neon;
QuantizeRowStaticFn quantize_row_static_scalar, quantize_row_static_avx2,
    quantize_row_static_avx512, quantize_row_static_neon;

// The kernel in force, for the linear ops that quantise their input themselves.
const QuantizeRowsKernel& quantize_rows_kernel();

}  // namespace trine
