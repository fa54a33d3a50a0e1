// The CUDA kernels of ternary24_linear; ternary24_linear.h says what they compute.
#pragma once

#include "common/cuda/linear.h"

namespace trine {

// From more rows on, unpacking the weight for the sparse tensor cores is the smaller part.
inline constexpr int64_t kTernary24FewRows = 64;

// Rows of `linear.weight` are packed groups, as few rows of x are best multiplied by. Returns when
// the work is queued on `stream`.
void ternary24_linear_few_cuda(const DeviceLinear& linear, cudaStream_t stream);

// The packed weight [n][packed_stride] as int8 values [n][16 * chunks] and indices [n][chunks] of
// sparse24_linear, for k columns in chunks of 32. `values` begins at a multiple of 16.
void ternary24_unpack_cuda(const uint8_t* packed, int64_t packed_stride, int64_t n, int64_t k,
                           int8_t* values, uint32_t* indices, cudaStream_t stream);

}  // namespace trine
