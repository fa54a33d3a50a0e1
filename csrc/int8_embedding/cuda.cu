// int8_embedding for every GPU from sm_80 on: memory-bound, by the writing of y. A warp works on a
// slice of a row: a few slices of one long row keep as many warps busy as many short rows do.
#include "int8_embedding/cuda.h"

#include "common/cuda/assert.cuh"
#include "common/cuda/convert.cuh"
#include "common/cuda/device.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/memory.cuh"

namespace trine {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpThreads;
// A lane works on chunks of 16 bytes of y, a warp apart; all its loads are on their way before it
// uses one.
constexpr int kHeld = 4;
constexpr int kSliceChunks = kHeld * kWarpThreads;

template <class T>
constexpr int kValues = 16 / int(sizeof(T));  // of y in a chunk, and bytes of codes

__device__ __forceinline__ uint32_t bits_of(float value, float) { return __float_as_uint(value); }
__device__ __forceinline__ uint32_t bits_of(float value, bfloat16) {
  return narrow_to_bfloat16(value).bits;
}
__device__ __forceinline__ uint32_t bits_of(float value, float16) {
  return narrow_to_float16(value).bits;
}

// kWide: rows of y begin at multiples of 16 bytes.
template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads)
    int8_embedding_kernel(EmbeddingOnDevice problem, int64_t slices) {
  const int64_t unit = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarpThreads;
  const int64_t row = unit / slices;
  if (row >= problem.count) return;
  const int64_t first = unit % slices * kSliceChunks + threadIdx.x % kWarpThreads;
  const int64_t index = problem.wide_indices ? static_cast<const int64_t*>(problem.indices)[row]
                                             : static_cast<const int32_t*>(problem.indices)[row];
  device_assert(index >= 0 && index < problem.v, "int8_embedding: indices must lie in [0, V)");
  const int8_t* const codes = problem.codes + index * problem.stride;
  const float scale = problem.scale[index];
  T* const y = static_cast<T*>(problem.y) + row * problem.dim;

  uint32_t held[kHeld][kValues<T> / 4];  // four codes in each
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t at = (first + i * kWarpThreads) * kValues<T>;
    if (at < problem.dim) load_global<kValues<T>>(held[i], codes + at);
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t at = (first + i * kWarpThreads) * kValues<T>;
    if (at >= problem.dim) continue;
    uint32_t words[4] = {};
#pragma unroll
    for (int j = 0; j < kValues<T>; ++j) {
      const auto code = static_cast<int8_t>(held[i][j / 4] >> j % 4 * 8);
      const uint32_t bits = bits_of(float(code) * scale, T{});
      words[j * sizeof(T) / 4] |= bits << j * sizeof(T) % 4 * 8;
    }
    if constexpr (kWide) {
      store_global<16>(y + at, words);
    } else {
#pragma unroll
      for (int j = 0; j < kValues<T>; ++j) {
        const uint32_t bits = words[j * sizeof(T) / 4] >> j * sizeof(T) % 4 * 8;
        if (at + j < problem.dim) store_global<int(sizeof(T))>(y + at + j, &bits);
      }
    }
  }
}

template <class T>
void embed(const EmbeddingOnDevice& problem, cudaStream_t stream) {
  const int64_t chunks = (problem.dim + kValues<T> - 1) / kValues<T>;
  const int64_t slices = (chunks + kSliceChunks - 1) / kSliceChunks;
  const bool wide =
      problem.dim % kValues<T> == 0 && reinterpret_cast<uintptr_t>(problem.y) % 16 == 0;
  const int64_t blocks = (problem.count * slices + kWarps - 1) / kWarps;
  launch("int8_embedding", wide ? int8_embedding_kernel<T, true> : int8_embedding_kernel<T, false>,
         {blocks, kThreads}, stream, problem, slices);
}

}  // namespace

void int8_embedding_cuda(const EmbeddingOnDevice& problem, cudaStream_t stream) {
  if (problem.count == 0 || problem.dim == 0) return;
  switch (problem.type) {
    case FloatType::float32:
      return embed<float>(problem, stream);
    case FloatType::bfloat16:
      return embed<bfloat16>(problem, stream);
    case FloatType::float16:
      return embed<float16>(problem, stream);
  }
}

}  // namespace trine
