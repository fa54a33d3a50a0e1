// ternary_linear for every GPU from sm_80 on.
#include "ternary_linear/cuda.h"

#include "common/cuda/few_rows.cuh"
#include "common/cuda/many_rows.cuh"
#include "ternary_linear/ternary_linear.h"

namespace trine {
namespace {

constexpr uint32_t kCodeOfEachByte = 0x03030303u;

// A shift for every fragment is nearly as much work as its mask. In two sets, every other fragment
// stays where it lies, 4 times too large: one shift and four masks for a word, 20 instructions for
// a chunk instead of 28. A warp has an eighth of all k, so that sums of 4 * code * q stay below
// 2^29 for any k that the op takes.
struct TernaryChunk {
  static constexpr int kPieces = 1, kMostBatchTiles = 8;
  static constexpr int parts(int, int) { return 1; }
  static constexpr int most_weight_tiles(int batch_tiles) {
    return batch_tiles <= 2 ? 4 : kMostTiles / batch_tiles;
  }
  static constexpr int kUnits = 4;  // a word each
  static constexpr int kMostSets = 2;
  static constexpr int32_t kOffset = 1;
  static constexpr bool kActivates = true;
  static constexpr int least_blocks(int batch_tiles) { return batch_tiles <= 2 ? 1 : 0; }
  template <int kSets>
  static __device__ __forceinline__ uint32_t fragment(const uint4 (&chunk)[1], int unit, int f) {
    return word_of(chunk[0], unit) >> 2 * (f - f % kSets) & kCodeOfEachByte << 2 * (f % kSets);
  }
};

// Packed rows stay packed in shared memory: a fragment is a word, shared by the four lanes of its
// row, shifted and masked.
struct TernaryStage {
  using Operands = S8;
  using Sum = int32_t;
  static constexpr int32_t kOffset = 1;
  static constexpr int kStageRowBytes = kStageK / int(kTernaryPerByte);
  static __device__ __forceinline__ uint32_t unit_offset_of(int row, int) {
    return uint32_t(row * kStageRowBytes);
  }
  static __device__ __forceinline__ void fragments(uint32_t (&b)[2], const unsigned char* stage,
                                                   int n, int step, int lane) {
    const uint2 words =
        *reinterpret_cast<const uint2*>(stage + (n + lane / 4) * kStageRowBytes + 8 * step);
    b[0] = words.x >> 2 * (lane % 4) & kCodeOfEachByte;
    b[1] = words.y >> 2 * (lane % 4) & kCodeOfEachByte;
  }
};

// Four codes as the weights that they stand for, signed bytes. No byte of the sum exceeds 0x82, so
// none carries into the next.
__device__ __forceinline__ uint32_t weights_of(uint32_t codes) {
  return (codes + 0x7f7f7f7fu) ^ 0x80808080u;
}

// Groups. Their sums are added in ascending order, so a warp works through all of k for its 16
// weight rows and 8 activation rows. All four lanes of a row read the same chunk, 64 codes, which
// no group cuts, and each takes the four of every sixteen that the fragment layout gives it. That
// makes four times as many instructions for a byte of the weight as without groups.
constexpr int kGroupedWarps = 4;

__global__ void __launch_bounds__(kGroupedWarps* kWarpThreads)
    grouped_kernel(DeviceLinear linear, int64_t chunks_per_group, int64_t groups) {
  const int warp = int(threadIdx.x) / kWarpThreads, lane = int(threadIdx.x) % kWarpThreads;
  const int row = lane / 4, quarter = lane % 4;
  constexpr int kBlockWeights = kGroupedWarps * kTileWeights;
  const int64_t weight_blocks = (linear.n + kBlockWeights - 1) / kBlockWeights;
  const int64_t n0 = blockIdx.x % weight_blocks * kBlockWeights + warp * kTileWeights;
  const int64_t m0 = blockIdx.x / weight_blocks * kTileBatch;

  float total[4] = {};
  for (int64_t g = 0; g < groups; ++g) {
    int32_t sums[4] = {};
    for (int64_t chunk = g * chunks_per_group; chunk < (g + 1) * chunks_per_group; ++chunk) {
      uint4 weight[2] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t n = n0 + half * 8 + row;
        if (n < linear.n)
          load_global<16>(&weight[half], linear.weight + n * linear.weight_stride + chunk * 16);
      }
#pragma unroll
      for (int pair = 0; pair < 4; pair += 2) {
        uint32_t a[4], x[2] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[i] = weights_of(word_of(weight[i % 2], pair + i / 2) >> 2 * quarter & kCodeOfEachByte);
        if (m0 + row < linear.m) {
          const int8_t* q = linear.q + (m0 + row) * linear.q_stride + chunk * kTernaryChunk;
#pragma unroll
          for (int i = 0; i < 2; ++i)
            load_global<4>(&x[i], q + (pair + i) * kTernaryPerWord + 4 * quarter);
        }
        multiply(S8{}, sums, a, x);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t n = n0 + i / 2 * 8 + row;
      if (n < linear.n) total[i] = total[i] + float(sums[i]) * linear.weight_scale[n * groups + g];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t n = n0 + i / 2 * 8 + row, m = m0 + 2 * quarter + i % 2;
    if (n >= linear.n || m >= linear.m) continue;
    const float scaled = total[i] * linear.x_scale[m];
    const float value =
        linear.bias == nullptr ? scaled : scaled + read_float(linear.bias, linear.bias_type, n);
    write_float(linear.y, linear.type, m * linear.n + n, activated(linear.activation, value));
  }
}

}  // namespace

void ternary_linear_cuda(const DeviceLinear& linear, cudaStream_t stream) {
  if (linear.m == 0 || linear.n == 0) return;
  if (linear.m <= kFewRows)
    few_rows_linear<TernaryChunk>("ternary_linear", linear, stream);
  else if (compute_capability() == 90 && linear.weight_stride > 0)
    ternary_linear_cuda_sm90a(linear, stream);
  else
    many_rows_linear<TernaryStage>("ternary_linear", linear, stream);
}

void ternary_linear_grouped_cuda(const DeviceLinear& linear, int64_t group_size, int64_t groups,
                                 cudaStream_t stream) {
  if (linear.m == 0 || linear.n == 0) return;
  const auto pieces = [](int64_t count, int size) { return (count + size - 1) / size; };
  launch("ternary_linear", grouped_kernel,
         {pieces(linear.n, kGroupedWarps * kTileWeights) * pieces(linear.m, kTileBatch),
          kGroupedWarps * kWarpThreads},
         stream, linear, group_size / kTernaryChunk, groups);
}

}  // namespace trine
