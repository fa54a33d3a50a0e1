// int8_linear for every GPU from sm_80 on.
#include "int8_linear/cuda.h"

#include "common/cuda/few_rows.cuh"
#include "common/cuda/many_rows.cuh"
#include "common/cuda/reduce.cuh"

namespace trine {
namespace {

struct Int8Chunk {
  static constexpr int kPieces = 1, kMostBatchTiles = 8;
  static constexpr int parts(int, int) { return 1; }
  static constexpr int most_weight_tiles(int batch_tiles) {
    return batch_tiles <= 2 ? 4 : kMostTiles / batch_tiles;
  }
  static constexpr int kUnits = 1, kMostSets = 1;
  static constexpr int32_t kOffset = 0;
  static constexpr bool kActivates = true;
  static constexpr int least_blocks(int batch_tiles) { return batch_tiles <= 4 ? 2 : 1; }
  template <int kSets>
  static __device__ __forceinline__ uint32_t fragment(const uint4 (&chunk)[1], int, int f) {
    return word_of(chunk[0], f);
  }
};

struct Int8Stage {
  using Operands = S8;
  using Sum = int32_t;
  static constexpr int32_t kOffset = 0;
  static constexpr int kStageRowBytes = kStageK;
  static __device__ __forceinline__ uint32_t unit_offset_of(int row, int unit) {
    return unit_offset(row, unit);
  }
  // Two matrices: the 16 bytes of the step's first half of the 8 rows, and of its second.
  static __device__ __forceinline__ void fragments(uint32_t (&b)[2], const unsigned char* stage,
                                                   int n, int step, int lane) {
    load_matrix_pair(b, shared_address(stage + unit_offset(n + lane % 8, 2 * step + lane / 8 % 2)));
  }
};

// A warp sums a row.
constexpr int kRowsPerBlock = 8;

__global__ void __launch_bounds__(kRowsPerBlock* kWarpThreads)
    zero_point_kernel(DeviceLinear linear, const int32_t* zero_point, int32_t* minus) {
  const int64_t n = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarpThreads;
  const int lane = threadIdx.x % kWarpThreads;
  if (n >= linear.n) return;  // the whole warp
  int32_t sum = 0;
  for (int64_t at = lane * 16; at < linear.weight_stride; at += kWarpThreads * 16) {
    uint4 chunk;
    load_global<16>(&chunk, linear.weight + n * linear.weight_stride + at);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum = __dp4a(int32_t(word_of(chunk, i)), 0x01010101, sum);
  }
  sum = reduce_lanes<kWarpThreads>(sum, Sum{});
  if (lane == 0) minus[n] = int32_t(uint32_t(sum) * uint32_t(*zero_point));
}

}  // namespace

void int8_linear_cuda(const DeviceLinear& linear, cudaStream_t stream) {
  if (linear.m == 0 || linear.n == 0) return;
  if (linear.m <= kFewRows)
    few_rows_linear<Int8Chunk>("int8_linear", linear, stream);
  else if (compute_capability() == 90 && linear.weight_stride > 0)
    int8_linear_cuda_sm90a(linear, stream);
  else
    many_rows_linear<Int8Stage>("int8_linear", linear, stream);
}

void int8_zero_point_cuda(const DeviceLinear& linear, const int32_t* zero_point, int32_t* minus,
                          cudaStream_t stream) {
  if (linear.n == 0) return;
  launch("int8_linear", zero_point_kernel,
         {(linear.n + kRowsPerBlock - 1) / kRowsPerBlock, kRowsPerBlock * kWarpThreads}, stream,
         linear, zero_point, minus);
}

}  // namespace trine
