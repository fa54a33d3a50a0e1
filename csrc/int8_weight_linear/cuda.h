// The CUDA kernels of int8_weight_linear; int8_weight_linear.h says what they compute.
#pragma once

#include "common/cuda/linear.h"

namespace trine {

// Of `linear`, q are the rows of x, of the same type as y, q_stride bytes apart; weight_scale is
// [n][groups]. Sums of 16-bit x are taken by the tensor cores, of fp32 x by fused multiply-adds.
struct DeviceWeightLinear {
  DeviceLinear linear;
  int64_t k;
  int64_t x_bytes;     // of a row of x; of 16-bit x whole units of 16, zero from k on, aligned
  int64_t groups;      // at least 1
  int64_t group_size;  // k, if there is but one
};

// Returns when the work is queued on `stream`.
void int8_weight_linear_cuda(const DeviceWeightLinear& problem, cudaStream_t stream);

}  // namespace trine
