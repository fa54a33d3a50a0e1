// RMSNorm of each row (Zhang & Sennrich 2019), quantised to int8: in fp32, one rounding at each
// step,
//   r    = 1 / sqrt(S / K + eps)
//   y[k] = narrow((x[k] * r) * weight[k])       in x's type, as torch.nn.RMSNorm returns it
//   q, scale, sum = quantize_rows(y)
// S, the sum of the squares, is pairwise, which every backend can follow at full speed: squares
// kSumLanes apart are added in ascending order; of the kSumLanes sums, neighbours are added, then
// neighbours of those, until one is left (what is missing counts as 0).
//
// S overflows where x reaches 1.8e19: then r is 0 and so is the row. NaN and infinity spoil the row
// (scale NaN), and so does a row of zeros if eps is 0.
#pragma once

#include <cstdint>

#include "common/float_types.h"
#include "common/isa.h"

namespace trine {

// A row of floats that a GPU's block of 512 threads holds needs no addition of the first kind.
inline constexpr int64_t kSumLanes = 8192;

// Writes y, in x's type. weight: float [k], or null for ones.
using RmsNormRowFn = void(const void* x, FloatType type, int64_t k, const float* weight, float eps,
                          void* y);

struct RmsNormKernel {
  Isa needs;
  RmsNormRowFn* row;
};

RmsNormRowFn rms_norm_row_scalar, rms_norm_row_avx2, rms_norm_row_avx512, rms_norm_row_neon;

}  // namespace trine
