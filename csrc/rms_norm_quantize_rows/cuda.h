// The CUDA kernel of rms_norm_quantize_rows; rms_norm_quantize_rows.h says what it computes.
#pragma once

#include "quantize_rows/cuda.h"

namespace trine {

struct NormOnDevice {
  const void* weight;    // [k], aligned to its type, or null for ones
  bool weight_is_float;  // else it has the type of x
  float eps;
};

// As quantize_rows_cuda.
void rms_norm_quantize_rows_cuda(const void* x, FloatType type, int64_t m, int64_t k,
                                 int64_t row_bytes, const NormOnDevice& norm,
                                 const QuantizedOnDevice& to, cudaStream_t stream);

}  // namespace trine
