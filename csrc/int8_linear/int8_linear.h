// y[m][n] = (float(acc) * x.scale[m]) * weight_scale[n] + bias[n],
// acc = sum over k of q[m][k] * w[n][k], exact in int32.
//
// Packed weight: int8 [n][16 * ceil(k / 16)], values in [-127, 127], padding 0, so that every row
// starts on a 16-byte boundary.
//
// Statically quantised activations have a zero point: acc is then the sum of (q - zero_point) * w.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/linear.h"

namespace trine {

inline constexpr int64_t kInt8Chunk = 16;  // bytes to which a packed row is padded
// 127 * 127 * k must stay below 2^31.
inline constexpr int64_t kInt8MaxK = 131072;
// With a zero point |q - zero_point| reaches 255: 255 * 127 * k must stay below 2^31.
inline constexpr int64_t kInt8MaxKStatic = 65536;

struct Int8Weight {
  const int8_t* packed;
  int64_t stride;  // bytes from row to row
  int64_t k;
  const float* scale;  // [n]
};

using Int8LinearFn = void(const QuantizedRows& x, int32_t input_zero_point,
                          const Int8Weight& weight, const LinearOutput& out, const Tile& tile);

struct Int8LinearKernel {
  Isa needs;
  Int8LinearFn* run;
};

Int8LinearFn int8_linear_scalar, int8_linear_avx2, int8_linear_avx2vnni, int8_linear_avx2vnni_evex,
    int8_linear_avx512vnni, int8_linear_dotprod, int8_linear_i8mm;

}  // namespace trine
