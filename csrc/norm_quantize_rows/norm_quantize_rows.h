// A norm of each row, RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016), quantised to
// int8: in fp32, one rounding at each step,
//   d[k] = x[k]               RMSNorm
//   d[k] = x[k] - S(x) / K    LayerNorm
//   r    = 1 / sqrt(S(d * d) / K + eps)
//   y[k] = narrow((d[k] * r) * weight[k] + bias[k])       in x's type, as torch's norms return it
//   q, scale, sum = quantize_rows(y)
// S, a sum over the row, is pairwise, which every backend can follow at full speed: values
// kSumLanes apart are added in ascending order; of the kSumLanes sums, neighbours are added, then
// neighbours of those, until one is left (what is missing counts as 0).
//
// S(d * d) overflows where d reaches 1.8e19: then r is 0, and y the bias. A row of which S(x)
// overflows is spoiled (scale NaN), as it is by NaN and infinity, and where d is 0 and eps is, too.
#pragma once

#include <cstdint>

#include "common/float_types.h"
#include "common/isa.h"

namespace trine {

// A row of floats that a GPU's block of 512 threads holds needs no addition of the first kind.
inline constexpr int64_t kSumLanes = 8192;

enum class Norm { rms, layer };

struct NormOfRow {
  Norm norm;
  const float* weight;  // [k], or null for ones
  const float* bias;    // [k], or null for zeros
  float eps;
};

// Writes y, in x's type.
using NormRowFn = void(const void* x, FloatType type, int64_t k, const NormOfRow& norm, void* y);

struct NormKernel {
  Isa needs;
  NormRowFn* row;
};

NormRowFn norm_row_scalar, norm_row_avx2, norm_row_avx512, norm_row_neon;

}  // namespace trine
