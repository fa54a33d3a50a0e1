// The CUDA kernels of sparse24_linear; sparse24_linear.h says what they compute.
//
// The weight is operand A of the tensor cores, which its layout suits as it is: a chunk's values
// are what mma.sp and wgmma.sp read of a row, and its word of indices their metadata of it, or, for
// 16-bit values, two halves of it.
#pragma once

#include "common/cuda/linear.h"

namespace trine {

enum class Sparse24Values { int8, float16, bfloat16 };

// A chunk is 32 columns: 16 values and one word of indices.
//
// linear.q is x in the values' type: for int8 as linear.h says; for 16-bit values x itself, rows
// q_stride bytes apart, q and q_stride multiples of 16, and no x_scale, x_sum or weight_scale.
// linear.weight is the values, weight_stride bytes (16 or 32 times `chunks`) from row to row.
struct DeviceSparse24 {
  DeviceLinear linear;
  int64_t x_bytes;          // of a row of x that may be read, a multiple of 16; zero from k on
  const uint32_t* indices;  // [n][chunks], beginning at a multiple of 16
  int64_t chunks;
  Sparse24Values values;
};

// Where positions past the last chunk, or of rows past the last, are made up: any that ascend.
inline constexpr uint32_t kSparse24AnyIndices = 0x44444444u;

// Returns when the work is queued on `stream`.
void sparse24_linear_cuda(const DeviceSparse24& sparse, cudaStream_t stream);

// The same on sm_90a alone, best where it suits: rows of indices that begin at multiples of 16
// bytes (the copy engine's wish), and outputs for half of the multiprocessors.
bool sparse24_suits_sm90a(const DeviceSparse24& sparse);
void sparse24_linear_cuda_sm90a(const DeviceSparse24& sparse, cudaStream_t stream);

}  // namespace trine
