// Integer linear layers for few rows of activations (at most 64 at a time), where reading the
// weight is the work: every GPU from sm_80 on.
//
// Operands are swapped: the weight's rows are the 16 rows of A of mma.m16n8k32, the activations its
// 8 columns of B, so that one row costs the tensor cores no more than eight. The sum over k may run
// in any order that A and B share, so each lane takes 16 consecutive bytes of a weight row straight
// into its registers, and the activations that belong to them: no shared memory, no shuffles.
//
//   lane 4r + q of a warp: weight rows r and r + 8 of a tile, chunk 4i + q of them (16 bytes or, of
//   2:4 ternary, 48); the 16, 64 or 256 activations of that chunk, of rows r of each batch tile.
//
// The warps of a block share the chunks among them, and add up their sums at the end.
//
// What bounds it, as calculated: the weight from memory. Latency times bandwidth is some 3.8 MB on
// an H200, 29 KB an SM. Each lane has eight loads of 16 bytes on their way: 32 KB in a block of 256
// threads, of which two fit an SM (9 to 16 ternary rows: half of that before the first use). So
// from 120 blocks on (1920 columns at one row) all of memory's bandwidth is asked for, and as
// blocks are equal and share it, they end together: 2560^2 is 160 blocks, 4096^2 256, 16384^2 256
// of four tiles, all of them in one wave. Where there are fewer blocks than SMs, they have twice
// the warps; the sum over k is never split over blocks.
//
// Why not dp4a for one row: memory brings an SM of an H200 1.2 chunks a clock (sm_80: 0.8, sm_89:
// 0.2), and each of the three starts 64 lanes of shifts, ANDs or dp4a a clock. A ternary chunk
// takes 20 to decode and would take 16 dp4a more for each row of x: 43 of the 64 at one row, 101 at
// four. The tensor cores take it at 0.15 products a clock and SM, of some 0.5, whatever the rows up
// to 8. With addresses and tails a chunk takes 24 lanes as compiled, 28 of the 64 a clock.
//
// Beyond 8 rows the activations, which every block reads from the L2, count as well: 16 bytes a
// row for 16 bytes of an INT8 weight, 64 for a ternary one, divided by the block's weight rows. Of
// blocks that share an SM, one finds in the L1 what another has read.
//
// A Weight, of which every thread makes one, says what a chunk holds:
//   kPieces        loads of 16 bytes; more than one: the last chunk of a row may be cut short
//   kUnits         units of 16 codes in a chunk
//   parts(weight_tiles, batch_tiles)   in which a chunk is taken, one after the other, where all at
//                  once would take too many registers. fragment() is asked for units of the first
//                  part alone; next_part<parts>(pieces) moves the next one there
//   kMostBatchTiles, most_weight_tiles(batch_tiles)   of a block, for want of registers
//   kOffset        what codes carry above the weights
//   kActivates     whether its op has activations
//   kMostSets      1, or 2: fragments may come in two sets, for sums of their own
//   least_blocks(batch_tiles)   of eight warps that an SM holds without spilling, or 0
//   fragment<kSets>(pieces, unit, f)   codes 4f .. 4f + 3 of a unit, as bytes, times 4^(f % kSets)
#pragma once

#include <type_traits>

#include "common/cuda/finish.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/matrix.cuh"
#include "common/cuda/memory.cuh"

namespace trine {

inline constexpr int kFewRowsWarps = 8, kMostFewRowsWarps = 16;
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

// Adds up the sums that the warps of a block left in shared memory, tile by tile, four of each
// lane, and writes finish(sum, m, n) to y. Integers wrap; floats are added in the order of the
// warps.
template <int kWeightTiles, int kBatchTiles, int kWarps, class Sum, class Finish>
__device__ __forceinline__ void store_added_sums(const DeviceLinear& linear, int64_t n0, int64_t m0,
                                                 const Sum* all, const Finish& finish) {
  using Total = std::conditional_t<std::is_same_v<Sum, float>, float, uint32_t>;
  constexpr int kTiles = kWeightTiles * kBatchTiles;
  // Neighbouring threads take neighbouring columns of y.
  for (int e = int(threadIdx.x); e < kTiles * kTileSums; e += kWarps * kWarpThreads) {
    const int n_in = e % (kWeightTiles * kTileWeights), m_in = e / (kWeightTiles * kTileWeights);
    const int64_t n = n0 + n_in, m = m0 + m_in;
    if (n >= linear.n || m >= linear.m) continue;
    // Sums of row r and column c of a tile: lane 4 (r % 8) + c / 2, sum 2 (r / 8) + c % 2.
    const int tile = n_in / kTileWeights * kBatchTiles + m_in / kTileBatch;
    const int r = n_in % kTileWeights, c = m_in % kTileBatch;
    const int at = tile * kTileSums + (r % 8 * 4 + c / 2) * 4 + r / 8 * 2 + c % 2;
    Total sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += Total(all[w * kTiles * kTileSums + at]);
    write_float(linear.y, linear.type, m * linear.n + n, finish(Sum(sum), m, n));
  }
}

// How many blocks an SM must hold. Where ptxas is told, it does as the source says; told nothing
// (0), it waits for loads one after the other to save registers for blocks that there are not.
template <class Weight, int kBatchTiles, int kWarps>
inline constexpr int kLeastBlocks =
    (Weight::least_blocks(kBatchTiles) * kFewRowsWarps + kWarps - 1) / kWarps;

template <class Weight, int kWeightTiles, int kBatchTiles>
inline constexpr int kPartsOfChunk = Weight::parts(kWeightTiles, kBatchTiles);

template <class Weight, int kWeightTiles, int kBatchTiles, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpThreads, kLeastBlocks<Weight, kBatchTiles, kWarps>)
    few_rows_kernel(DeviceLinear linear) {
  // Two rows of each tile. From 32 activation rows on, their own loads are as many as the weight's.
  constexpr int kPieces = Weight::kPieces, kLoads = 2 * kWeightTiles * kPieces;
  constexpr int kWished = kLoadsInFlight / kLoads / (kBatchTiles >= 4 ? 2 : 1);
  constexpr int kDepth = kWished == 0 ? 1 : kWished;
  constexpr int kParts = kPartsOfChunk<Weight, kWeightTiles, kBatchTiles>;
  constexpr int kTiles = kWeightTiles * kBatchTiles;
  // Beyond 8 activation rows, a second set would take registers from the second block of an SM.
  constexpr int kSets = kBatchTiles == 1 ? Weight::kMostSets : 1;
  static_assert(kTiles <= kMostTiles);
  constexpr int kPieceBytes = 16, kUnitBytes = 16, kLanesOfRow = 4;
  constexpr int kChunkBytes = kPieces * kPieceBytes;
  const Weight format;
  TRINE_SHARED_ARRAY(int4, partial, kWarps * kTiles * kWarpThreads);

  const int warp = int(threadIdx.x) / kWarpThreads, lane = int(threadIdx.x) % kWarpThreads;
  const int row = lane / kLanesOfRow, quarter = lane % kLanesOfRow;
  // Blocks with the same weight rows come together: one finds in the L2 what another has read.
  const int64_t row_blocks = (linear.m + kBatchTiles * kTileBatch - 1) / (kBatchTiles * kTileBatch);
  const int64_t n0 = blockIdx.x / row_blocks * (kWeightTiles * kTileWeights);
  const int64_t m0 = blockIdx.x % row_blocks * (kBatchTiles * kTileBatch);
  const int64_t chunks = (linear.weight_stride + kChunkBytes - 1) / kChunkBytes;

  int32_t sums[kSets][kWeightTiles][kBatchTiles][4] = {};
  for (int64_t first = warp * kLanesOfRow; first < chunks; first += kDepth * kWarps * kLanesOfRow) {
    uint4 weight[kDepth][kWeightTiles][2][kPieces] = {};
#pragma unroll
    for (int d = 0; d < kDepth; ++d)
#pragma unroll
      for (int t = 0; t < kWeightTiles; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t chunk = first + d * kWarps * kLanesOfRow + quarter;
          const int64_t n = n0 + t * kTileWeights + half * 8 + row;
#pragma unroll
          for (int piece = 0; piece < kPieces; ++piece) {
            const int64_t at = chunk * kChunkBytes + piece * kPieceBytes;
            if (chunk < chunks && n < linear.n && (kPieces == 1 || at < linear.weight_stride))
              weight[d][t][half][piece] =
                  load_global_once(linear.weight + n * linear.weight_stride + at);
          }
        }
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int64_t chunk = first + d * kWarps * kLanesOfRow + quarter;
      // Of a loop that is known to run once ptxas would put off the loads of the last pieces until
      // the first have arrived.
      int parts = kParts;
      if constexpr (kPieces > 1) asm volatile("" : "+r"(parts));
#pragma unroll 1
      for (int part = 0; part < parts; ++part) {
#pragma unroll
        for (int unit = 0; unit < Weight::kUnits / kParts; ++unit) {
          uint4 x[kBatchTiles] = {};
#pragma unroll
          for (int b = 0; b < kBatchTiles; ++b) {
            const int64_t m = m0 + b * kTileBatch + row;
            const int64_t at =
                ((chunk * kParts + part) * (Weight::kUnits / kParts) + unit) * kUnitBytes;
            if (chunk < chunks && m < linear.m && (kPieces == 1 || at < linear.q_stride))
              load_global<kUnitBytes>(&x[b], linear.q + m * linear.q_stride + at);
          }
#pragma unroll
          for (int product = 0; product < 2; ++product) {
            // Two fragments of one set.
            constexpr int kFirst = kSets == 1 ? 2 : 1;
            const int f0 = product * kFirst, f1 = f0 + kSets;
#pragma unroll
            for (int t = 0; t < kWeightTiles; ++t) {
              const uint4(&rows)[2][kPieces] = weight[d][t];
              const uint32_t a[4] = {format.template fragment<kSets>(rows[0], unit, f0),
                                     format.template fragment<kSets>(rows[1], unit, f0),
                                     format.template fragment<kSets>(rows[0], unit, f1),
                                     format.template fragment<kSets>(rows[1], unit, f1)};
#pragma unroll
              for (int b = 0; b < kBatchTiles; ++b) {
                const uint32_t columns[2] = {word_of(x[b], f0), word_of(x[b], f1)};
                multiply(S8{}, sums[f0 % kSets][t][b], a, columns);
              }
            }
          }
        }
        if constexpr (kParts > 1) {
#pragma unroll
          for (int t = 0; t < kWeightTiles; ++t)
#pragma unroll
            for (int half = 0; half < 2; ++half)
              Weight::template next_part<kParts>(weight[d][t][half]);
        }
      }
    }
  }

#pragma unroll
  for (int t = 0; t < kWeightTiles; ++t)
#pragma unroll
    for (int b = 0; b < kBatchTiles; ++b) {
      int32_t total[4] = {};
#pragma unroll
      for (int set = 0; set < kSets; ++set)
#pragma unroll
        for (int i = 0; i < 4; ++i) total[i] += sums[set][t][b][i] >> 2 * set;
      partial[(warp * kTiles + t * kBatchTiles + b) * kWarpThreads + lane] = {total[0], total[1],
                                                                              total[2], total[3]};
    }
  __syncthreads();

  store_added_sums<kWeightTiles, kBatchTiles, kWarps>(
      linear, n0, m0, reinterpret_cast<const int32_t*>(partial),
      [&](int32_t sum, int64_t m, int64_t n) {
        const float value = finished<Weight::kOffset>(linear, sum, m, column_scaling(linear, n));
        return Weight::kActivates ? activated(linear.activation, value) : value;
      });
}

// Any number of rows; more than kFewRows at a time are cut into pieces of that many.
template <class Weight>
void few_rows_linear(const char* op, const DeviceLinear& linear, cudaStream_t stream) {
  const auto pieces = [](int64_t count, int size) { return (count + size - 1) / size; };
  const auto run = [&]<int kWeightTiles, int kBatchTiles, int kWarps = kFewRowsWarps>() {
    launch(
        op, few_rows_kernel<Weight, kWeightTiles, kBatchTiles, kWarps>,
        {pieces(linear.n, kWeightTiles * kTileWeights) * pieces(linear.m, kBatchTiles * kTileBatch),
         kWarps * kWarpThreads},
        stream, linear);
  };
  // More weight rows in a block mean that fewer blocks read the activations, as long as there are
  // blocks for all multiprocessors.
  const int64_t all = multiprocessors();
  const auto fills = [&](int weight_tiles) {
    return linear.n >= int64_t(weight_tiles) * kTileWeights * all;
  };
  const bool alone = pieces(linear.n, kTileWeights) <= all;
  constexpr int kMost = kMostFewRowsWarps;
  const auto of = [&]<int kBatchTiles>() {
    constexpr int kWeightTiles = Weight::most_weight_tiles(kBatchTiles);
    if (kWeightTiles > 1 && fills(kWeightTiles))
      run.template operator()<kWeightTiles, kBatchTiles>();
    else if (kBatchTiles <= 2 && alone)
      run.template operator()<1, kBatchTiles, kBatchTiles <= 2 ? kMost : kFewRowsWarps>();
    else
      run.template operator()<1, kBatchTiles>();
  };
  if (linear.m <= 8)
    of.template operator()<1>();
  else if (linear.m <= 16)
    of.template operator()<2>();
  else if (linear.m <= 32 || Weight::kMostBatchTiles == 4)
    of.template operator()<4>();
  else
    of.template operator()<Weight::kMostBatchTiles>();
}

}  // namespace trine
