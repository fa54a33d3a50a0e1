// The CUDA kernels of int8_linear; int8_linear.h says what they compute.
#pragma once

#include "common/cuda/linear.h"

namespace trine {

// Rows of `linear.weight` are int8, zero from k on. Returns when the work is queued on `stream`.
void int8_linear_cuda(const DeviceLinear& linear, cudaStream_t stream);

// The same on sm_90a alone, best for many rows.
void int8_linear_cuda_sm90a(const DeviceLinear& linear, cudaStream_t stream);

// minus[n] = zero_point * the sum of row n, modulo 2^32: what activations that are all at the zero
// point give.
void int8_zero_point_cuda(const DeviceLinear& linear, const int32_t* zero_point, int32_t* minus,
                          cudaStream_t stream);

}  // namespace trine
