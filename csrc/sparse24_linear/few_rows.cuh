// sparse24_linear for at most 16 rows of x, where reading the weight is the work: every GPU from
// sm_80 on. As common/cuda/few_rows.cuh, whose shares of the work and last sum over warps it has:
// values go from memory straight into the registers of A, 16 consecutive bytes of a row in a lane,
// and x into those of B, with the columns of k in an order of their own. Neither passes shared
// memory.
//
// A step is 64 bytes of each of 16 rows of values, which meet 128 bytes of each row of x: two
// products. Lane 4r + q holds
//   of values    rows r and r + 8, piece kPieceOf[q] of 16 bytes. Product i takes its words 2i and
//                2i + 1.
//   of x         row r. The columns of pieces 0 and 1 are the first 64 bytes; lanes q = 0 and 1
//   need
//                the even and the odd words of these, lanes 2 and 3 of the other 64. Of a pair each
//                lane loads 32 bytes, and the two exchange what the other one needs.
//   of indices   what is metadata of these products, see Indices.
// A warp takes two steps at a time, a unit: 128 bytes of a row, whole lines.
//
// What bounds it, as calculated: the weight from memory, 72 bytes of 16-bit values and their
// indices, or 40 with int8 values, where a dense bf16 weight has 128. A lane has eight loads of 16
// bytes of values on their way, or four, 32 to 64 KB an SM, as common/cuda/few_rows.cuh reckons. A
// step of one weight tile is 1152 bytes (int8 values: 1280), 55 clocks of an SM's share of an
// H200's memory, in which it can issue 220 instructions: as compiled it takes some 95 up to 8 rows,
// 110 or 155 up to 16.
#pragma once

#include "common/cuda/few_rows.cuh"
#include "sparse24_linear/values.cuh"

namespace trine {

inline constexpr int kSparse24FewRows = 16;
inline constexpr int kStepBytes = 64;  // of a row of values
inline constexpr int kUnitSteps = 2;   // whose loads go together
inline constexpr int kProductsOfStep = 2;

// Which piece of a step's 64 bytes lane q of four takes: 0, 2, 1, 3.
__device__ __forceinline__ int piece_of(int quarter) { return quarter % 2 * 2 + quarter / 2; }

// The words of indices that a lane turns into metadata of a unit's products. kWhole: rows begin at
// multiples of what a load brings.
template <class Values>
struct Indices;

// Words first .. first + kWords - 1 of row n; where there is none, positions that ascend.
template <int kWords, bool kWhole>
__device__ __forceinline__ void load_indices(uint32_t (&words)[kWords],
                                             const DeviceSparse24& sparse, int64_t n,
                                             int64_t first) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = kSparse24AnyIndices;
  if (n >= sparse.linear.n) return;
  const uint32_t* const row = sparse.indices + n * sparse.chunks;
  if constexpr (kWhole) {
    if (first < sparse.chunks) load_global<4 * kWords>(words, row + first);
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      if (first + i < sparse.chunks) load_global<4>(&words[i], row + first + i);
  }
}

// A step is four chunks, piece p of them chunk p. Lane q of four holds the metadata of row r or, if
// odd, r + 8: of the pieces of all four lanes, words 2i or, if q >= 2, 2i + 1, whose indices are as
// many bytes.
template <>
struct Indices<Int8Values> {
  static constexpr int kWords = 4;
  uint32_t words[kUnitSteps][kWords];

  template <bool kWhole>
  __device__ __forceinline__ void load(const DeviceSparse24& sparse, int64_t row_n, int64_t unit,
                                       int quarter) {
#pragma unroll
    for (int step = 0; step < kUnitSteps; ++step)
      load_indices<kWords, kWhole>(words[step], sparse, row_n + quarter % 2 * 8,
                                   (unit * kUnitSteps + step) * kWords);
  }

  __device__ __forceinline__ uint32_t metadata(int step, int product, int quarter) const {
    const uint32_t byte = uint32_t(2 * product + quarter / 2);
    const uint32_t two = byte | (byte + 4) << 4;
    return __byte_perm(__byte_perm(words[step][0], words[step][2], two),
                       __byte_perm(words[step][1], words[step][3], two), 0x5410);
  }
};

// A step is two chunks, of two pieces each. Two lanes of four hold the metadata of a product: the
// lower two in the first step of a unit, the upper two in the second. Of these the even one holds
// that of words 2i of the four pieces, the odd one that of words 2i + 1: a nibble each, for i = 0
// from bytes 0 and 2 of both chunks' indices, for i = 1 from bytes 1 and 3. A nibble of one chunk
// and the same one of the other make a byte of `both`.
template <class Type, class Element>
struct Indices<Float16Values<Type, Element>> {
  static constexpr int kWords = 2;
  uint32_t words[2][kWords];  // of rows r and r + 8

  template <bool kWhole>
  __device__ __forceinline__ void load(const DeviceSparse24& sparse, int64_t row_n, int64_t unit,
                                       int quarter) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      load_indices<kWords, kWhole>(words[half], sparse, row_n + half * 8,
                                   (unit * kUnitSteps + quarter / 2) * kWords);
  }

  __device__ __forceinline__ uint32_t metadata(int, int product, int quarter) const {
    uint32_t both[2];
    const int shift = quarter % 2 * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      both[half] =
          (words[half][0] >> shift & 0x0f0f0f0fu) | (words[half][1] >> shift << 4 & 0xf0f0f0f0u);
    return __byte_perm(both[0], both[1], product == 0 ? 0x6420 : 0x7531);
  }
};

// The columns of x of a step, in both products' order: b[product].
struct StepOfX {
  uint32_t b[kProductsOfStep][4];

  // By the whole warp. This lane loads 32 bytes at `at` of the `bytes` of its row; without a row,
  // and past its end, zeros.
  __device__ __forceinline__ void load(const uint8_t* row, int64_t at, int64_t bytes, bool odd) {
    uint4 loaded[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (row != nullptr && at + i * 16 < bytes) load_global<16>(&loaded[i], row + at + i * 16);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t even_word = word_of(loaded[j / 2], j % 2 * 2);
      const uint32_t odd_word = word_of(loaded[j / 2], j % 2 * 2 + 1);
      const uint32_t own = odd ? odd_word : even_word;
      const uint32_t other = __shfl_xor_sync(kWholeWarp, odd ? even_word : odd_word, 1);
      b[j / 2][j % 2 * 2] = odd ? other : own;
      b[j / 2][j % 2 * 2 + 1] = odd ? own : other;
    }
  }
};

template <class Sum>
struct alignas(16) LaneSums {
  Sum values[4];
};

// How many blocks of eight warps an SM must hold; two weight tiles and two of x take the registers
// of both.
template <int kTiles>
inline constexpr int kSparse24Blocks = kTiles == 4 ? 1 : 2;

template <class Values, int kWeightTiles, int kBatchTiles, int kWarps, bool kWhole>
__global__ void __launch_bounds__(kWarps* kWarpThreads,
                                  kSparse24Blocks<kWeightTiles * kBatchTiles>* kFewRowsWarps /
                                      kWarps) sparse24_few_rows_kernel(DeviceSparse24 sparse) {
  using Sum = typename Values::Sum;
  constexpr int kTiles = kWeightTiles * kBatchTiles;
  constexpr int kDepth = kTiles == 1 ? kLoadsInFlight / (2 * kUnitSteps) : 1;
  constexpr int kXStepBytes = 2 * kStepBytes, kPairBytes = 64, kLaneBytes = 32;
  TRINE_SHARED_ARRAY(LaneSums<Sum>, partial, kWarps * kTiles * kWarpThreads);

  const DeviceLinear& linear = sparse.linear;
  const int warp = int(threadIdx.x) / kWarpThreads, lane = int(threadIdx.x) % kWarpThreads;
  const int row = lane / 4, quarter = lane % 4;
  const int64_t weight_blocks =
      (linear.n + kWeightTiles * kTileWeights - 1) / (kWeightTiles * kTileWeights);
  const int64_t n0 = blockIdx.x % weight_blocks * (kWeightTiles * kTileWeights);
  const int64_t m0 = blockIdx.x / weight_blocks * (kBatchTiles * kTileBatch);
  constexpr int kUnitBytes = kUnitSteps * kStepBytes;
  const int64_t units = (linear.weight_stride + kUnitBytes - 1) / kUnitBytes;

  Sum sums[kWeightTiles][kBatchTiles][4] = {};
  for (int64_t first = warp; first < units; first += kDepth * kWarps) {
    uint4 values[kDepth][kWeightTiles][kUnitSteps][2] = {};
    Indices<Values> indices[kDepth][kWeightTiles];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int64_t unit = first + d * kWarps;
#pragma unroll
      for (int t = 0; t < kWeightTiles; ++t) {
#pragma unroll
        for (int step = 0; step < kUnitSteps; ++step)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int64_t n = n0 + t * kTileWeights + half * 8 + row;
            const int64_t at = unit * kUnitBytes + step * kStepBytes + piece_of(quarter) * 16;
            if (at < linear.weight_stride && n < linear.n)
              values[d][t][step][half] =
                  load_global_once(linear.weight + n * linear.weight_stride + at);
          }
        indices[d][t].template load<kWhole>(sparse, n0 + t * kTileWeights + row, unit, quarter);
      }
    }
#pragma unroll
    for (int d = 0; d < kDepth; ++d)
#pragma unroll
      for (int step = 0; step < kUnitSteps; ++step) {
        StepOfX x[kBatchTiles];
#pragma unroll
        for (int b = 0; b < kBatchTiles; ++b) {
          const int64_t m = m0 + b * kTileBatch + row;
          const int64_t at = ((first + d * kWarps) * kUnitSteps + step) * kXStepBytes +
                             quarter / 2 * kPairBytes + quarter % 2 * kLaneBytes;
          const auto* const rows = reinterpret_cast<const uint8_t*>(linear.q);
          x[b].load(m < linear.m ? rows + m * linear.q_stride : nullptr, at, sparse.x_bytes,
                    quarter % 2 == 1);
        }
#pragma unroll
        for (int product = 0; product < kProductsOfStep; ++product)
#pragma unroll
          for (int t = 0; t < kWeightTiles; ++t) {
            const uint4(&rows)[2] = values[d][t][step];
            const uint32_t a[4] = {word_of(rows[0], 2 * product), word_of(rows[1], 2 * product),
                                   word_of(rows[0], 2 * product + 1),
                                   word_of(rows[1], 2 * product + 1)};
            const uint32_t metadata = indices[d][t].metadata(step, product, quarter);
#pragma unroll
            for (int b = 0; b < kBatchTiles; ++b) {
              if constexpr (!kInt8Values<Values>) {
                if (step == 1) {
                  multiply_sparse<1>(typename Values::Operands{}, sums[t][b], a, x[b].b[product],
                                     metadata);
                  continue;
                }
              }
              multiply_sparse<0>(typename Values::Operands{}, sums[t][b], a, x[b].b[product],
                                 metadata);
            }
          }
      }
  }

#pragma unroll
  for (int t = 0; t < kWeightTiles; ++t)
#pragma unroll
    for (int b = 0; b < kBatchTiles; ++b) {
      const Sum(&four)[4] = sums[t][b];
      partial[(warp * kTiles + t * kBatchTiles + b) * kWarpThreads + lane] = {four[0], four[1],
                                                                              four[2], four[3]};
    }
  __syncthreads();
  store_added_sums<kWeightTiles, kBatchTiles, kWarps>(
      linear, n0, m0, reinterpret_cast<const Sum*>(partial), [&](Sum sum, int64_t m, int64_t n) {
        return Values::finish(linear, sum, m, Values::column(linear, n));
      });
}

template <class Values>
void sparse24_few_rows(const DeviceSparse24& sparse, cudaStream_t stream) {
  const DeviceLinear& linear = sparse.linear;
  const auto pieces = [](int64_t count, int size) { return (count + size - 1) / size; };
  const auto run = [&]<int kWeightTiles, int kBatchTiles, int kWarps, bool kWhole = true>() {
    launch(
        "sparse24_linear",
        sparse24_few_rows_kernel<Values, kWeightTiles, kBatchTiles, kWarps, kWhole>,
        {pieces(linear.n, kWeightTiles * kTileWeights) * pieces(linear.m, kBatchTiles * kTileBatch),
         kWarps * kWarpThreads},
        stream, sparse);
  };
  const int64_t all = multiprocessors(), tiles = pieces(linear.n, kTileWeights);
  constexpr int kFew = kFewRowsWarps, kMost = kMostFewRowsWarps;
  const auto of = [&]<int kBatchTiles>() {
    if (sparse.chunks % Indices<Values>::kWords != 0)
      run.template operator()<1, kBatchTiles, kFew, false>();
    else if (tiles >= 2 * 2 * all)  // two blocks for each multiprocessor
      run.template operator()<2, kBatchTiles, kFew>();
    else if (tiles > all)
      run.template operator()<1, kBatchTiles, kFew>();
    else
      run.template operator()<1, kBatchTiles, kMost>();
  };
  linear.m <= kTileBatch ? of.template operator()<1>() : of.template operator()<2>();
}

}  // namespace trine
