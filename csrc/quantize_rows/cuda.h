// The CUDA kernel of quantize_rows; quantize_rows.h says what it computes (the dynamic formula).
#pragma once

#include <cstdint>

#include "common/cuda/stream.h"
#include "common/float_types.h"

namespace trine {

// x: m rows of k values, row_bytes from row to row, aligned to its type. q [m, k], scale [m],
// sum [m], all in the memory of the current device. Returns when the work is queued on `stream`.
void quantize_rows_cuda(const void* x, FloatType type, int64_t m, int64_t k, int64_t row_bytes,
                        int8_t* q, float* scale, int32_t* sum, cudaStream_t stream);

}  // namespace trine
