// The CUDA kernel of norm_quantize_rows; norm_quantize_rows.h says what it computes.
#pragma once

#include "norm_quantize_rows/norm_quantize_rows.h"
#include "quantize_rows/cuda.h"

namespace trine {

struct ParameterOnDevice {
  const void* values;  // [k], aligned to its type, or null
  bool is_float;       // else it has the type of x
};

struct NormOnDevice {
  Norm norm;
  ParameterOnDevice weight, bias;
  float eps;
};

// As quantize_rows_cuda.
void norm_quantize_rows_cuda(const void* x, FloatType type, int64_t m, int64_t k, int64_t row_bytes,
                             const NormOnDevice& norm, const QuantizedOnDevice& to,
                             cudaStream_t stream);

}  // namespace trine
