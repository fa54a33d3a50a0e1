// The CUDA kernels of ternary_linear; ternary_linear.h says what they compute.
#pragma once

#include "common/cuda/linear.h"

namespace trine {

// Rows of `linear.weight` are packed codes. Returns when the work is queued on `stream`.
void ternary_linear_cuda(const DeviceLinear& linear, cudaStream_t stream);

// The same on sm_90a alone, best for many rows.
void ternary_linear_cuda_sm90a(const DeviceLinear& linear, cudaStream_t stream);

// The same with a scale for each group of `group_size` codes: linear.weight_scale is [n][groups].
void ternary_linear_grouped_cuda(const DeviceLinear& linear, int64_t group_size, int64_t groups,
                                 cudaStream_t stream);

}  // namespace trine
