// Integer linear layers for few rows of activations (at most 64 at a time), where reading the
// weight is the work: every GPU from sm_80 on.
//
// Operands are swapped: the weight's rows are the 16 rows of A of mma.m16n8k32, the activations its
// 8 columns of B, so that one row costs the tensor cores no more than eight. The sum over k may run
// in any order that A and B share, so each lane takes 16 consecutive bytes of a weight row straight
// into its registers, and the activations that belong to them: no shared memory, no shuffles.
//
//   lane 4r + q of a warp: weight rows r and r + 8 of a tile, chunk 4i + q of them (16 bytes);
//   the 16, or for ternary 64, activations of that chunk, of rows r of each batch tile.
//
// The warps of a block share the chunks among them, and add up their sums at the end.
//
// What bounds it: the weight from memory. Each lane has eight loads of 16 bytes on their way before
// it uses the first: 32 KB in a block of 256 threads, and two blocks fit an SM at any time; latency
// times bandwidth of one SM of an H200 is some 25 KB. Beyond 16 rows the activations, which every
// block reads from the L2, cost as much.
//
// A Weight says what a chunk holds:
//   kUnits         units of 16 codes in 16 bytes
//   kOffset        what codes carry above the weights
//   fragment(chunk, unit, f)   codes 4f .. 4f + 3 of a unit, as bytes
#pragma once

#include "common/cuda/finish.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/matrix.cuh"
#include "common/cuda/memory.cuh"

namespace trine {

inline constexpr int kFewRowsWarps = 8;
inline constexpr int kLoadsInFlight = 8;  // of 16 bytes, by each lane
inline constexpr int kTileWeights = 16;   // weight rows of a tile
inline constexpr int kTileBatch = 8;      // activation rows of a tile
inline constexpr int kTileSums = kTileWeights * kTileBatch;
// Registers and shared memory hold the sums of eight tiles.
inline constexpr int kMostTiles = 8;
inline constexpr int kFewRows = kMostTiles * kTileBatch;

__device__ __forceinline__ uint32_t word_of(const uint4& chunk, int i) {
  return i == 0 ? chunk.x : i == 1 ? chunk.y : i == 2 ? chunk.z : chunk.w;
}

template <class Weight, int kWeightTiles, int kBatchTiles>
__global__ void __launch_bounds__(kFewRowsWarps* kWarpThreads)
    few_rows_kernel(DeviceLinear linear) {
  // Two rows of each tile. From 32 activation rows on, their own loads are as many as the weight's.
  constexpr int kDepth = kLoadsInFlight / (2 * kWeightTiles) / (kBatchTiles >= 4 ? 2 : 1);
  constexpr int kTiles = kWeightTiles * kBatchTiles;
  static_assert(kTiles <= kMostTiles && kDepth >= 1);
  constexpr int kChunkBytes = 16, kUnitBytes = 16, kLanesOfRow = 4;
  TRINE_SHARED_ARRAY(int4, partial, kFewRowsWarps * kTiles * kWarpThreads);

  const int warp = int(threadIdx.x) / kWarpThreads, lane = int(threadIdx.x) % kWarpThreads;
  const int row = lane / kLanesOfRow, quarter = lane % kLanesOfRow;
  const int64_t weight_blocks =
      (linear.n + kWeightTiles * kTileWeights - 1) / (kWeightTiles * kTileWeights);
  const int64_t n0 = blockIdx.x % weight_blocks * (kWeightTiles * kTileWeights);
  const int64_t m0 = blockIdx.x / weight_blocks * (kBatchTiles * kTileBatch);
  const int64_t chunks = linear.weight_stride / kChunkBytes;

  int32_t sums[kWeightTiles][kBatchTiles][4] = {};
  for (int64_t first = warp * kLanesOfRow; first < chunks;
       first += kDepth * kFewRowsWarps * kLanesOfRow) {
    uint4 weight[kDepth][kWeightTiles][2] = {};
#pragma unroll
    for (int d = 0; d < kDepth; ++d)
#pragma unroll
      for (int t = 0; t < kWeightTiles; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t chunk = first + d * kFewRowsWarps * kLanesOfRow + quarter;
          const int64_t n = n0 + t * kTileWeights + half * 8 + row;
          if (chunk < chunks && n < linear.n)
            weight[d][t][half] =
                load_global_once(linear.weight + n * linear.weight_stride + chunk * kChunkBytes);
        }
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int64_t chunk = first + d * kFewRowsWarps * kLanesOfRow + quarter;
#pragma unroll
      for (int unit = 0; unit < Weight::kUnits; ++unit) {
        uint4 x[kBatchTiles] = {};
#pragma unroll
        for (int b = 0; b < kBatchTiles; ++b) {
          const int64_t m = m0 + b * kTileBatch + row;
          if (chunk < chunks && m < linear.m)
            load_global<kUnitBytes>(&x[b], linear.q + m * linear.q_stride +
                                               (chunk * Weight::kUnits + unit) * kUnitBytes);
        }
#pragma unroll
        for (int f = 0; f < 4; f += 2)
#pragma unroll
          for (int t = 0; t < kWeightTiles; ++t) {
            const uint32_t a[4] = {Weight::fragment(weight[d][t][0], unit, f),
                                   Weight::fragment(weight[d][t][1], unit, f),
                                   Weight::fragment(weight[d][t][0], unit, f + 1),
                                   Weight::fragment(weight[d][t][1], unit, f + 1)};
#pragma unroll
            for (int b = 0; b < kBatchTiles; ++b) {
              const uint32_t columns[2] = {word_of(x[b], f), word_of(x[b], f + 1)};
              multiply(S8{}, sums[t][b], a, columns);
            }
          }
      }
    }
  }

#pragma unroll
  for (int t = 0; t < kWeightTiles; ++t)
#pragma unroll
    for (int b = 0; b < kBatchTiles; ++b)
      partial[(warp * kTiles + t * kBatchTiles + b) * kWarpThreads + lane] = {
          sums[t][b][0], sums[t][b][1], sums[t][b][2], sums[t][b][3]};
  __syncthreads();

  // Neighbouring threads take neighbouring columns of y.
  const int32_t* all = reinterpret_cast<const int32_t*>(partial);
  for (int e = int(threadIdx.x); e < kTiles * kTileSums; e += kFewRowsWarps * kWarpThreads) {
    const int n_in = e % (kWeightTiles * kTileWeights), m_in = e / (kWeightTiles * kTileWeights);
    const int64_t n = n0 + n_in, m = m0 + m_in;
    if (n >= linear.n || m >= linear.m) continue;
    // Sums of row r and column c of a tile: lane 4 (r % 8) + c / 2, sum 2 (r / 8) + c % 2.
    const int tile = n_in / kTileWeights * kBatchTiles + m_in / kTileBatch;
    const int r = n_in % kTileWeights, c = m_in % kTileBatch;
    const int at = tile * kTileSums + (r % 8 * 4 + c / 2) * 4 + r / 8 * 2 + c % 2;
    uint32_t sum = 0;
#pragma unroll
    for (int w = 0; w < kFewRowsWarps; ++w) sum += uint32_t(all[w * kTiles * kTileSums + at]);
    write_float(linear.y, linear.type, m * linear.n + n,
                finished<Weight::kOffset>(linear, int32_t(sum), m, column_scaling(linear, n)));
  }
}

// Any number of rows; more than kFewRows at a time are cut into pieces of that many.
template <class Weight>
void few_rows_linear(const char* op, const DeviceLinear& linear, cudaStream_t stream) {
  const auto run = [&]<int kWeightTiles, int kBatchTiles>() {
    const auto pieces = [](int64_t count, int size) { return (count + size - 1) / size; };
    launch(
        op, few_rows_kernel<Weight, kWeightTiles, kBatchTiles>,
        {pieces(linear.n, kWeightTiles * kTileWeights) * pieces(linear.m, kBatchTiles * kTileBatch),
         kFewRowsWarps * kWarpThreads},
        stream, linear);
  };
  // More weight rows in a block mean that fewer blocks read the activations, as long as there are
  // blocks for all multiprocessors.
  const auto fills = [&](int weight_tiles) {
    return linear.n >= int64_t(weight_tiles) * kTileWeights * multiprocessors();
  };
  if (linear.m <= 8)
    fills(4) ? run.template operator()<4, 1>() : run.template operator()<1, 1>();
  else if (linear.m <= 16)
    fills(4) ? run.template operator()<4, 2>() : run.template operator()<1, 2>();
  else if (linear.m <= 32)
    fills(2) ? run.template operator()<2, 4>() : run.template operator()<1, 4>();
  else
    run.template operator()<1, 8>();
}

}  // namespace trine
