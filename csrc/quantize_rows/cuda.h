// The CUDA kernels of quantize_rows; quantize_rows.h says what they compute.
#pragma once

#include <cstdint>

#include "common/cuda/stream.h"
#include "common/float_types.h"

namespace trine {

// Where the result goes, in the memory of the current device: q [m][width], zero from k on, scale
// [m], sum [m].
struct QuantizedOnDevice {
  int8_t* q;
  int64_t width;
  float* scale;
  int32_t* sum;
};

// x: m rows of k values, row_bytes from row to row, aligned to its type. Returns when the work is
// queued on `stream`.
void quantize_rows_cuda(const void* x, FloatType type, int64_t m, int64_t k, int64_t row_bytes,
                        const QuantizedOnDevice& to, cudaStream_t stream);

struct StaticScaleOnDevice {
  const float* scale;
  const int32_t* zero_point;  // or null
};

// The static formula. `to.width` must be a multiple of 4; `to.sum` is not written, for no kernel of
// statically quantised rows reads it.
void quantize_rows_static_cuda(const void* x, FloatType type, int64_t m, int64_t k,
                               int64_t row_bytes, const StaticScaleOnDevice& fixed,
                               const QuantizedOnDevice& to, cudaStream_t stream);

}  // namespace trine
