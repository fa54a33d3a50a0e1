// Linear layer whose weight alone is int8 (W8A16): activations stay as they are.
//
//   y[m][n] = narrow(sum over groups g of scale[n][g] * (sum over k of g of x[m][k] * w[n][k])
//                    + bias[n])
//
// in fp32, with one rounding to y's type. Packed weight: as int8_linear's, int8
// [n][16 * ceil(k / 16)], padding 0. A group is `group_size` consecutive k, a multiple of 64 that
// divides k; or one group is all of k.
//
// Every w is exact in fp32, and in bf16, too. The order of the sum depends on the kernel and on the
// number of rows of x, never on the tile: results do not depend on the number of threads. It errs
// by at most 4 * eps * sqrt(k) * sum |x * w * scale|, where no sum of x * w leaves the range of
// fp32 before it is scaled. The kernel for pairs of bf16 takes
// subnormal operands, products and sums for 0.
//
// What sets the least time: n * k bytes of weight (a quarter of fp32's, half of bf16's) for few
// rows, m * n * k multiply-adds for many, where the dense product in fp32 (pairs: in bf16) is what
// it can reach: converting the weight comes on top.
#pragma once

#include <cstdint>

#include "common/float_rows.h"
#include "common/isa.h"
#include "common/linear.h"

namespace trine {

inline constexpr int64_t kInt8WeightChunk = 16;  // bytes to which a packed row is padded

// From this many rows on, bf16 x is multiplied in pairs where the processor can.
inline constexpr int64_t kInt8WeightPairedRows = 7;

// Activations as a kernel wants them: in fp32, or, for pairs, in bf16.
struct WideRows {
  const void* data;
  int64_t stride;  // values from row to row, a multiple of 16; zero from k on
  int64_t m;       // of the whole call, not of a tile
};

struct GroupedInt8Weight {
  const int8_t* packed;
  int64_t stride;  // bytes from row to row
  int64_t k;
  const float* scale;  // [n][groups]
  int64_t groups;      // at least 1

  int64_t group_size() const { return k / groups; }
};

// Writes row m of `x`, and zeros from x.k to `stride`.
using WidenRowFn = void(const FloatRows& x, int64_t m, int64_t stride, void* to);
using Int8WeightLinearFn = void(const WideRows& x, const GroupedInt8Weight& weight,
                                const LinearOutput& out, const Tile& tile);

struct Int8WeightLinearKernel {
  Isa needs;
  FloatType rows;  // of WideRows
  WidenRowFn* widen;
  Int8WeightLinearFn* run;
};

WidenRowFn int8_weight_widen_scalar, int8_weight_widen_avx2, int8_weight_widen_avx512,
    int8_weight_widen_avx512bf16, int8_weight_widen_neon;
Int8WeightLinearFn int8_weight_linear_scalar, int8_weight_linear_avx2, int8_weight_linear_avx512,
    int8_weight_linear_avx512bf16, int8_weight_linear_neon;

}  // namespace trine
