// Weights in {-1, 0, 1}, int8 activations; acc = sum over k of q[m][k] * w[n][k], exact in int32.
//
// One scale for the weight, or one per row:
//   y[m][n] = (float(acc) * x.scale[m]) * weight_scale[n] + bias[n]
// Groups of `group_size` consecutive k, each with a scale of its own, acc_g being the part of acc
// that group g contributes, added in ascending order from +0:
//   y[m][n] = (sum over g of float(acc_g) * weight_scale[n][g]) * x.scale[m] + bias[n]
//
// Packed weight: code = w + 1 in two bits, little-endian int32 [n][4 * ceil(k / 64)], so that every
// row starts on a 16-byte boundary. A word holds 16 consecutive k: bits 2i..2i+1 of its byte j hold
// the code of k = 4i + j; codes past k are 1. `(word >> 2i) & 0x03030303` is then four consecutive
// codes, as every instruction that multiplies u8 by s8 in groups of four wants them. Kernels
// multiply codes, not weights, and take the row's `x.sum` away at the end.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/linear.h"

namespace trine {

inline constexpr int64_t kTernaryChunk = 64;    // values to which a packed row is padded
inline constexpr int64_t kTernaryPerByte = 4;   // values in a byte
inline constexpr int64_t kTernaryPerWord = 16;  // values in an int32
// The sum of code * q must stay below 2^31 even where a damaged weight holds the code 3, which no
// weight has: 3 * 127 * 2^22 does.
inline constexpr int64_t kTernaryMaxK = int64_t{1} << 22;

struct TernaryWeight {
  const uint8_t* packed;
  int64_t stride;  // bytes from row to row
  int64_t k;
  const float* scale;  // one value, [n], or [n][k / group_size]
  bool per_tensor;     // scale is one value
  int64_t group_size;  // 0: no groups
};

using TernaryLinearFn = void(const QuantizedRows& x, const TernaryWeight& weight,
                             const LinearOutput& out, const Tile& tile);

struct TernaryLinearKernel {
  Isa needs;
  TernaryLinearFn* run;
};

TernaryLinearFn ternary_linear_scalar, ternary_linear_avx2, ternary_linear_avx2vnni,
    ternary_linear_avx2vnni_evex, ternary_linear_avx512vnni, ternary_linear_dotprod,
    ternary_linear_i8mm;

}  // namespace trine
