// The CUDA kernel of int8_embedding; int8_embedding.h says what it computes.
#pragma once

#include <cstdint>

#include "common/cuda/stream.h"
#include "common/float_types.h"

namespace trine {

// All in the memory of the current device.
struct EmbeddingOnDevice {
  const void* indices;  // [count], int64 or int32
  bool wide_indices;    // int64
  int64_t count;
  const int8_t* codes;  // [v][stride]; rows begin at multiples of 16 bytes
  int64_t stride;       // dim, rounded up to a multiple of 16
  const float* scale;   // [v]
  int64_t v, dim;
  void* y;  // [count][dim], aligned to its type
  FloatType type;
};

// Returns when the work is queued on `stream`. An index outside of [0, v) is a failed assertion on
// the device.
void int8_embedding_cuda(const EmbeddingOnDevice& problem, cudaStream_t stream);

}  // namespace trine
