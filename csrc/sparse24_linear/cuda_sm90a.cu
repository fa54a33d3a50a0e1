// sparse24_linear for many rows on sm_90a: wgmma with a sparse operand.
//
// The sparse operand must be A, so A is the weight and B is x: a block computes kWeights columns of
// y x kWidth rows at a time (pipeline.cuh says who does what). The layout of checkpoints is what
// the instruction wants: values as they lie, and a lane's metadata are a word of indices (int8) or
// halves of two words (16-bit types). The blocks of a cluster have the same rows: they share x.
//
// Two rings in shared memory: the weight, 128 bytes of values of each row with their indices, and
// x, 128 bytes of each row, two tiles of which serve one of the weight.
//
// What bounds it, as calculated: shared memory, 128 bytes a clock, if what the copy engine writes
// counts as what wgmma reads. A product of 64 x 192 takes the tensor cores 96 clocks and reads 192
// rows x 64 bytes of x for them, which is all there is already, and 64 x 32 of the weight; only
// what is written shrinks as tiles grow. Over 32 k (int8: 64), in kilobytes:
//
//   weight rows x rows of x   256 x 192   256 x 176   256 x 128   128 x 64   128 x 256
//   read, x and weight         48 + 8      44 + 8      32 + 8      8 + 4     32 + 4
//   written, weight and x       9 + 12      9 + 11      9 + 8    4.5 + 4    4.5 + 16
//   clocks                       616         576         456        164        452
//   of those, tensor cores       62%         61%         56%        39%        57%
//
// The last is the tile of dense kernels, which 128 sums a thread allow; 192 are as many as fit
// beside what a thread needs else. So 62% of the tensor cores' sparse rate, 1230 of 1979 TFLOP/s in
// bf16, is the calculated ceiling, 57.5% at 4096^3, where the tiles fill 2.9 turns of the SMs. If
// writes cost nothing, it is 86%. From the L2 come 36 KB of weight, 4 KB more as sectors of
// indices, and half of 48 KB of x in 2460 clocks, 6 TB/s for all SMs: what it gives. Unmeasured.
#include "common/cuda/finish.cuh"
#include "common/cuda/pipeline.cuh"
#include "common/cuda/wgmma.cuh"
#include "sparse24_linear/cuda.h"
#include "sparse24_linear/sparse24_linear.h"

namespace trine {
namespace sm90a {
namespace {

constexpr int kHalves = 2;    // tiles of x for one of the weight: half of it is not stored
constexpr int kProducts = 2;  // with a tile of x, of each 64 rows of the weight
constexpr int kStepValueBytes = 32, kStepBytes = 64;  // of a row of the weight and of x, in one
constexpr int kBoxWords = 4;  // of indices of a row: 16 bytes, the copy engine's least

// What a block computes at a time: kWeights columns of y, each of its two consumer warpgroups
// kBlocks times 64 of them, and kWidth rows.
template <int kBlocksOf64, int kRows>
struct TileOfY {
  static constexpr int kBlocks = kBlocksOf64, kWidth = kRows, kWeights = 2 * kBlocks * kGroupRows;
  static constexpr int kWeightStages = kBlocks == 1 ? 4 : 2, kStages = kHalves * kWeightStages;
  static constexpr int kStageBytes = kWidth * kTileRowBytes;
  static constexpr int kValueBytes = kWeights * kTileRowBytes;
};

__device__ __forceinline__ uint32_t defined(uint32_t word) {
  return word == 0 ? kSparse24AnyIndices : word;  // past the last row or chunk
}

// How tiles of the weight become metadata of a lane. `words` are those of the lane's first row; the
// next row's are kBoxWords on, the next box's `box_words`.
template <class Operands_>
struct Weight16 {
  using Operands = Operands_;
  using Sum = float;
  static constexpr int kBoxes = 1, kRegisters = 1;  // of metadata, in a half
  static constexpr int kSecondSelector = 1;
  // Lanes 0 and 1 of four serve the first product, 2 and 3 the second.
  static __device__ __forceinline__ void load_metadata(uint32_t (&metadata)[kRegisters],
                                                       const uint32_t* words, int, int half,
                                                       int lane) {
    words += kProducts * half + lane % 4 / 2;
    const uint32_t row = defined(words[0]), row_below = defined(words[8 * kBoxWords]);
    metadata[0] = __byte_perm(row, row_below, lane % 2 == 0 ? 0x5410 : 0x7632);
  }
};

struct Weight8 {
  using Operands = S8;
  using Sum = int32_t;
  static constexpr int kBoxes = 2, kRegisters = kProducts;
  static constexpr int kSecondSelector = 0;
  static __device__ __forceinline__ void load_metadata(uint32_t (&metadata)[kRegisters],
                                                       const uint32_t* words, int box_words,
                                                       int half, int lane) {
    words += half * box_words + lane % 2 * 8 * kBoxWords + lane % 4 / 2;
#pragma unroll
    for (int product = 0; product < kProducts; ++product)
      metadata[product] = defined(words[2 * product]);
  }
};

// Outputs pass through shared memory, 16 rows of y and a warpgroup's columns at a time. 16 more
// bytes from row to row let the 8 rows that a warp writes at a time fall in different banks.
constexpr int kPartRows = 16;
template <class T, int kBlocks>
constexpr int kOutBytes = kBlocks * kGroupRows * int(sizeof(T));
template <class T, int kBlocks>
constexpr int kOutStride = kOutBytes<T, kBlocks> + 16;
template <class T, int kBlocks>
constexpr int kStagingBytes = 2 * kPartRows * kOutStride<T, kBlocks>;  // of a warpgroup

template <class T>
__device__ __forceinline__ uint32_t pair(float first, float second) {
  T values[2];
  write_float(values, first);
  write_float(values + 1, second);
  return uint32_t(values[0].bits) | uint32_t(values[1].bits) << 16;
}

// The columns from n0 on and rows from m0 on that a warpgroup holds, transposed by way of
// `staging`, two buffers of its own: one is filled while others still read the other.
template <class T, class Sum, int kBlocks, int kCount>
__device__ __forceinline__ void store_sums(const DeviceLinear& linear, int64_t m0, int64_t n0,
                                           const Sum (&sums)[kBlocks][kCount],
                                           unsigned char* staging, int group) {
  constexpr int kBytes = kOutBytes<T, kBlocks>, kStride = kOutStride<T, kBlocks>;
  const int warp = int(threadIdx.x / kWarpThreads % 4), lane = int(threadIdx.x % kWarpThreads);
  constexpr bool kScaled = std::is_same_v<Sum, int32_t>;
  const bool has_bias = linear.bias != nullptr;  // adding 0 would turn -0 into +0
  float scale[kBlocks][2], bias[kBlocks][2];
#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t n = n0 + kGroupRows * block + 16 * warp + 8 * half + lane / 4;
      const bool inside = n < linear.n;
      scale[block][half] = kScaled && inside ? linear.weight_scale[n] : 0.0f;
      bias[block][half] = has_bias && inside ? read_float(linear.bias, linear.bias_type, n) : 0.0f;
    }
  const float* const x_scale = linear.x_scale + m0;
#pragma unroll
  for (int part = 0; part < kCount / 8; ++part) {
    unsigned char* const rows = staging + part % 2 * kPartRows * kStride;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      uint32_t fragment[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // eight rows i / 2, eight columns i % 2
        float y[2];
#pragma unroll
        for (int next = 0; next < 2; ++next) {
          const int row = 8 * (i / 2) + 2 * (lane % 4) + next;
          const Sum sum = sums[block][8 * part + 2 * i + next];
          y[next] = float(sum);
          if constexpr (kScaled) {
            const int m = kPartRows * part + row;
            y[next] = (y[next] * (x_scale[m0 + m < linear.m ? m : 0])) * scale[block][i % 2];
          }
          if (has_bias) y[next] += bias[block][i % 2];
          if constexpr (sizeof(T) == sizeof(float))
            reinterpret_cast<T*>(
                rows + row * kStride)[kGroupRows * block + 16 * warp + 8 * (i % 2) + lane / 4] =
                y[next];
        }
        if constexpr (sizeof(T) < sizeof(float)) fragment[i] = pair<T>(y[0], y[1]);
      }
      if constexpr (sizeof(T) < sizeof(float))
        store_matrices_transposed(
            shared_address(rows + (lane / 16 * 8 + lane % 8) * kStride +
                           (kGroupRows * block + 16 * warp + lane / 8 % 2 * 8) * int(sizeof(T))),
            fragment);
    }
    named_barrier_sync(1 + group, kGroupThreads);
    constexpr int kWarpRows = kPartRows / 4;
    store_rows<T, kWarpRows, kBytes, kStride>(linear, m0 + kPartRows * part + kWarpRows * warp, n0,
                                              rows + kWarpRows * warp * kStride);
  }
  // The next tile begins with the first buffer: nobody may still read it.
  if constexpr (kCount / 8 % 2 != 0) named_barrier_sync(1 + group, kGroupThreads);
}

template <class Weight, class T, class Tile>
__global__ void __launch_bounds__(kRolesThreads, 1)
    wgmma_sparse_kernel(const __grid_constant__ TensorMap x_map,
                        const __grid_constant__ TensorMap value_map,
                        const __grid_constant__ TensorMap index_map,
                        const __grid_constant__ TiledLinear problem) {
  constexpr int kBoxBytes = Tile::kWeights * kBoxWords * int(sizeof(uint32_t));
  constexpr int kWeightBytes = Tile::kValueBytes + Weight::kBoxes * kBoxBytes;
  TRINE_DYNAMIC_SHARED(shared);
  TRINE_SHARED_ARRAY(Mbarrier, landed, Tile::kStages + Tile::kWeightStages);
  TRINE_SHARED_ARRAY(Mbarrier, free, Tile::kStages + Tile::kWeightStages);
  const Ring<Tile::kWeightStages, kWeightBytes, 1> weights = {
      shared_address(shared), shared_address(landed), shared_address(free)};
  unsigned char* const stages = shared + Tile::kWeightStages * kWeightBytes;
  const Ring<Tile::kStages, Tile::kStageBytes, kCluster> ring = {
      shared_address(stages), shared_address(landed + Tile::kWeightStages),
      shared_address(free + Tile::kWeightStages)};
  // Of the tile that this block computes of its cluster's.
  const auto first_column = [](const RasterPosition& tile) {
    return (tile.column * kCluster + cluster_rank()) * Tile::kWeights;
  };
  uint32_t used = 0;  // tiles of the weight

  const auto init = [&] {
    weights.init();
    ring.init();
    prefetch_tensor_map(x_map);
    prefetch_tensor_map(value_map);
    prefetch_tensor_map(index_map);
  };
  const auto produce = [&](const RasterPosition& tile) {
#pragma unroll 1
    for (int step = 0; step < problem.steps; ++step, ++used) {
      const auto weight = weights.claim(used);
      load_tile(weight.tile, value_map, step * kTileRowBytes, int(first_column(tile)),
                weight.landed);
      for (int box = 0; box < Weight::kBoxes; ++box)
        load_tile(weight.tile + Tile::kValueBytes + box * kBoxBytes, index_map,
                  (step * Weight::kBoxes + box) * kBoxWords * int(sizeof(uint32_t)),
                  int(first_column(tile)), weight.landed);
      for (int half = 0; half < kHalves; ++half) {
        const auto stage = ring.claim(used * kHalves + half);
        load_shared_tile<Tile::kWidth>(stage.tile, x_map, (step * kHalves + half) * kTileRowBytes,
                                       int(tile.row) * Tile::kWidth, stage.landed);
      }
    }
  };
  const auto consume = [&](const RasterPosition& tile) {
    const int group = int(threadIdx.x / kGroupThreads) - 1;
    const int warp = int(threadIdx.x / kWarpThreads % 4), lane = int(threadIdx.x % kWarpThreads);
    typename Weight::Sum sums[Tile::kBlocks][Tile::kWidth / 2];
    uint32_t metadata[kHalves][Tile::kBlocks][Weight::kRegisters];
    for (int step = 0; step < problem.steps; ++step, ++used) {
      const auto weight = weights.await(used);
      const auto* words = reinterpret_cast<const uint32_t*>(
          shared + used % Tile::kWeightStages * kWeightBytes + Tile::kValueBytes);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        // The products of the half before may go on: they have other registers of metadata.
#pragma unroll
        for (int block = 0; block < Tile::kBlocks; ++block)
          Weight::load_metadata(
              metadata[half][block],
              words +
                  ((group * Tile::kBlocks + block) * kGroupRows + warp * 16 + lane / 4) * kBoxWords,
              kBoxBytes / int(sizeof(uint32_t)), half, lane);
        const auto stage = ring.await(used * kHalves + half);
        wgmma_fence();
#pragma unroll
        for (int block = 0; block < Tile::kBlocks; ++block) {
          const SharedAddress values =
              weight.tile + (group * Tile::kBlocks + block) * kGroupRows * kTileRowBytes +
              half * kProducts * kStepValueBytes;
          wgmma_sparse<0>(typename Weight::Operands{}, sums[block], tile_descriptor(values),
                          tile_descriptor(stage.tile), metadata[half][block][0],
                          step > 0 || half > 0);
          wgmma_sparse<Weight::kSecondSelector>(
              typename Weight::Operands{}, sums[block], tile_descriptor(values + kStepValueBytes),
              tile_descriptor(stage.tile + kStepBytes),
              metadata[half][block][Weight::kRegisters - 1], true);
        }
        wgmma_commit();
        wgmma_wait<1>();
#pragma unroll
        for (int block = 0; block < Tile::kBlocks; ++block) touch(sums[block]);
        if (step > 0 || half > 0) ring.release(used * kHalves + half - 1);
        if (step > 0 && half == 0) weights.release(used - 1);
      }
    }
    wgmma_wait<0>();
    ring.release(used * kHalves - 1);
    weights.release(used - 1);
#pragma unroll
    for (int block = 0; block < Tile::kBlocks; ++block) touch(sums[block]);
    store_sums<T>(
        problem.linear, tile.row * Tile::kWidth,
        first_column(tile) + group * Tile::kBlocks * kGroupRows, sums,
        stages + Tile::kStages * Tile::kStageBytes + group * kStagingBytes<T, Tile::kBlocks>,
        group);
  };
  run_roles(problem, init, produce, consume);
}

inline int64_t tiles(int64_t count, int64_t size) { return (count + size - 1) / size; }

template <class Weight, class T, class Tile>
void run(const DeviceSparse24& sparse, cudaStream_t stream) {
  const char* op = "sparse24_linear";
  const DeviceLinear& linear = sparse.linear;
  const int64_t index_bytes = sparse.chunks * kSparse24Indices;
  const TiledLinear problem = {linear, tiles(linear.m, Tile::kWidth),
                               tiles(linear.n, Tile::kWeights * kCluster),
                               int(tiles(linear.weight_stride, kTileRowBytes))};
  const TensorMap x_map = make_tensor_map(op, linear.q, linear.m, sparse.x_bytes, linear.q_stride,
                                          Tile::kWidth / kCluster);
  const TensorMap value_map = make_tensor_map(op, linear.weight, linear.n, linear.weight_stride,
                                              linear.weight_stride, Tile::kWeights);
  constexpr int kIndexRowBytes = kBoxWords * int(sizeof(uint32_t));
  const TensorMap index_map = make_tensor_map(op, sparse.indices, linear.n, index_bytes,
                                              index_bytes, Tile::kWeights, kIndexRowBytes);
  constexpr int kBytes =
      Tile::kWeightStages * (Tile::kValueBytes + Weight::kBoxes * Tile::kWeights * kIndexRowBytes) +
      Tile::kStages * Tile::kStageBytes + 2 * kStagingBytes<T, Tile::kBlocks>;
  launch_roles(op, wgmma_sparse_kernel<Weight, T, Tile>, problem, kBytes, stream, x_map, value_map,
               index_map);
}

// What passes through an SM's shared memory for 32 k (int8: 64), over all tiles that it computes
// one after the other.
template <class Tile>
int64_t traffic(const DeviceLinear& linear) {
  const int64_t clusters =
      tiles(linear.m, Tile::kWidth) * tiles(linear.n, Tile::kWeights * kCluster);
  const int64_t turns = tiles(clusters, std::max(multiprocessors() / kCluster, 1));
  constexpr int64_t kRead = Tile::kWeights * Tile::kWidth + kStepValueBytes * Tile::kWeights;
  constexpr int64_t kWritten =
      (kStepValueBytes + kSparse24Indices) * Tile::kWeights + kStepBytes * Tile::kWidth;
  return turns * (kRead + kWritten);
}

using SmallestTile = TileOfY<1, 64>;

struct Choice {
  int64_t traffic;
  void (*run)(const DeviceSparse24&, cudaStream_t);
};

// The smaller tiles are for fewer tiles than SMs, or little more than a whole number of turns:
// 4096 x 4096 outputs are 2.7 turns of the largest, 2.9 of the next.
template <class Weight, class T>
void run_best(const DeviceSparse24& sparse, cudaStream_t stream) {
  const auto choice = [&]<class Tile>(Tile) {
    return Choice{traffic<Tile>(sparse.linear), run<Weight, T, Tile>};
  };
  const Choice choices[] = {choice(TileOfY<2, 192>{}), choice(TileOfY<2, 176>{}),
                            choice(TileOfY<2, 128>{}), choice(SmallestTile{})};
  const auto less = [](const Choice& a, const Choice& b) { return a.traffic < b.traffic; };
  std::min_element(std::begin(choices), std::end(choices), less)->run(sparse, stream);
}

}  // namespace
}  // namespace sm90a

bool sparse24_suits_sm90a(const DeviceSparse24& sparse) {
  using namespace sm90a;
  const DeviceLinear& linear = sparse.linear;
  const int64_t most_tiles =
      tiles(linear.m, SmallestTile::kWidth) * tiles(linear.n, SmallestTile::kWeights);
  return sparse.chunks > 0 && sparse.chunks % kBoxWords == 0 && 2 * most_tiles >= multiprocessors();
}

void sparse24_linear_cuda_sm90a(const DeviceSparse24& sparse, cudaStream_t stream) {
  using namespace sm90a;
  switch (sparse.values) {
    case Sparse24Values::float16:
      return run_best<Weight16<F16>, float16>(sparse, stream);
    case Sparse24Values::bfloat16:
      return run_best<Weight16<Bf16>, bfloat16>(sparse, stream);
    case Sparse24Values::int8:
      break;
  }
  switch (sparse.linear.type) {
    case FloatType::float32:
      return run_best<Weight8, float>(sparse, stream);
    case FloatType::bfloat16:
      return run_best<Weight8, bfloat16>(sparse, stream);
    case FloatType::float16:
      return run_best<Weight8, float16>(sparse, stream);
  }
}

}  // namespace trine
