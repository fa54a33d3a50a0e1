// sparse24_linear for more rows of x: tiles of y on the tensor cores of every GPU from sm_80 on,
// operands brought to shared memory by cp.async.
//
// A block's eight warps stand four along the weight's rows and two along those of x, each computing
// kWarpWeights x kWarpBatch outputs. A stage is one product deep: 32 bytes of each row of values
// and 64 of each row of x, in the order in which ldmatrix makes fragments of them. Indices of four
// chunks, 16 bytes of a row, come at a time, into a ring of their own: a word of each row would
// take a copy, too, and each of those a whole sector from the L2.
//
// Rows of x, 64 bytes, lie as common/cuda/many_rows.cuh says; those of values, 32 bytes, with the
// two units swapped in every other four rows: the eight rows of a matrix fall in all 32 banks.
//
// What bounds it, as calculated: the rate of mma.sp, twice that of mma for the k it covers, where
// 256 x 128 outputs fill the GPU. A warp's 64 x 64 need 12 ldmatrix for 32 products, some 384
// clocks of the shared memory for 512 of the tensor cores; 32 x 32, 6 for 8, would be bound by the
// former. Fewer rows take smaller tiles, for as many blocks as there are multiprocessors: reading
// the weight, or x from the L2, is what they wait for.
#pragma once

#include "common/cuda/async_copy.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/many_rows.cuh"
#include "common/cuda/memory.cuh"
#include "sparse24_linear/values.cuh"

namespace trine {

inline constexpr int kSparse24WarpsAlong = 4, kSparse24WarpsAcross = 2;
inline constexpr int kSparse24Threads = kSparse24WarpsAlong * kSparse24WarpsAcross * kWarpThreads;

template <class Values_, int kWarpWeights_, int kWarpBatch_, int kStages_>
struct Sparse24Tiles {
  using Values = Values_;
  static constexpr int kWarpWeights = kWarpWeights_, kWarpBatch = kWarpBatch_, kStages = kStages_;
  static constexpr int kWeights = kSparse24WarpsAlong * kWarpWeights;
  static constexpr int kBatch = kSparse24WarpsAcross * kWarpBatch;
  static constexpr int kValueBytes = 32, kXBytes = 64;  // of a row, in a stage
  static constexpr int kStageXBytes = kBatch * kXBytes;
  static constexpr int kStageBytes = kStageXBytes + kWeights * kValueBytes;
  // Stages that a group of indices serves, and groups that they need at a time.
  static constexpr int kGroupWords = 4, kGroupRowBytes = 4 * kGroupWords;
  static constexpr int kStageWords = kValueBytes / Values::kChunkBytes;
  static constexpr int kGroupStages = kGroupWords / kStageWords;
  static constexpr int kGroups = (kStages - 1 + kGroupStages - 1) / kGroupStages + 1;
  static constexpr int kGroupBytes = kWeights * kGroupRowBytes;
  static constexpr int kDynamicBytes = kStages * kStageBytes + kGroups * kGroupBytes;
};

// How often a thread is called by by_all_threads.
template <int kCount>
inline constexpr int kRounds = (kCount + kSparse24Threads - 1) / kSparse24Threads;

// Calls each(i, round) for i from 0 to kCount - 1, shared among the threads of the block.
template <int kCount, class Each>
__device__ __forceinline__ void by_all_threads(const Each& each) {
#pragma unroll
  for (int round = 0; round < kRounds<kCount>; ++round) {
    const int i = round * kSparse24Threads + int(threadIdx.x);
    if (kCount % kSparse24Threads == 0 || i < kCount) each(i, round);
  }
}

// The offset of a unit of a row of 32 bytes.
__device__ __forceinline__ uint32_t value_unit_offset(int row, int unit) {
  return uint32_t(row * 32 + (unit ^ (row / 4 % 2)) * kCopyBytes);
}

// Metadata of the products of a warp's weight tiles: kWords of each lane, one for each tile of int8
// values, one for two tiles of 16-bit ones, the second of which is selected by 1. `group` holds
// four words of each of the warp's rows, `word` is the stage's first.
template <class Tiles>
__device__ __forceinline__ void load_metadata(uint32_t (&metadata)[Tiles::kWarpWeights / 16],
                                              const unsigned char* group, int word, int lane) {
  constexpr int kTiles = Tiles::kWarpWeights / 16;
  const int row = lane / 4, quarter = lane % 4;
  const auto at = [&](int of_row, int of_word) {
    return *reinterpret_cast<const uint32_t*>(group + of_row * Tiles::kGroupRowBytes + 4 * of_word);
  };
  if constexpr (kInt8Values<typename Tiles::Values>) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      metadata[i] = at(16 * i + row + quarter % 2 * 8, word + quarter / 2);
  } else {
#pragma unroll
    for (int i = 0; i < kTiles; i += 2) {
      const int of_row = 16 * (kTiles > 1 ? i + quarter / 2 : i) + row;
      metadata[i] =
          __byte_perm(at(of_row, word), at(of_row + 8, word), quarter % 2 == 0 ? 0x5410 : 0x7632);
      if (i + 1 < kTiles) metadata[i + 1] = metadata[i];
    }
  }
}

// A warp's outputs to y, 16 rows at a time by way of `staging`, the warp's own.
template <class Tiles, class T, class Outputs>
__device__ __forceinline__ void store_tiles(const DeviceLinear& linear, int64_t m0, int64_t n0,
                                            const Outputs& outputs, unsigned char* staging) {
  constexpr int kRows = 16, kRowBytes = Tiles::kWarpWeights * int(sizeof(T));
  constexpr int kStride = kRowBytes + 16;
  const int lane = int(threadIdx.x) % kWarpThreads;
#pragma unroll
  for (int part = 0; part < Tiles::kWarpBatch / kRows; ++part) {
#pragma unroll
    for (int i = 0; i < Tiles::kWarpWeights / 16; ++i)
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          const int row = 8 * j + 2 * (lane % 4) + s % 2, column = 16 * i + s / 2 * 8 + lane / 4;
          write_float(reinterpret_cast<T*>(staging + row * kStride) + column,
                      outputs[i][part * kRows / 8 + j][s]);
        }
    __syncwarp();
    store_rows<T, kRows, kRowBytes, kStride>(linear, m0 + part * kRows, n0, staging);
    __syncwarp();
  }
}

template <class Tiles>
__global__ void __launch_bounds__(kSparse24Threads, 1)
    sparse24_tiles_kernel(DeviceSparse24 sparse) {
  using Values = typename Tiles::Values;
  constexpr int kWeightTiles = Tiles::kWarpWeights / 16, kBatchTiles = Tiles::kWarpBatch / 8;
  constexpr int kStages = Tiles::kStages;
  TRINE_DYNAMIC_SHARED(stages);
  unsigned char* const groups = stages + kStages * Tiles::kStageBytes;

  const DeviceLinear& linear = sparse.linear;
  const int warp = int(threadIdx.x) / kWarpThreads, lane = int(threadIdx.x) % kWarpThreads;
  const int64_t row_tiles = (linear.m + Tiles::kBatch - 1) / Tiles::kBatch;
  const int64_t column_tiles = (linear.n + Tiles::kWeights - 1) / Tiles::kWeights;
  const RasterPosition tile = raster_position(blockIdx.x, row_tiles, column_tiles);
  const int64_t m0 = tile.row * Tiles::kBatch, n0 = tile.column * Tiles::kWeights;
  // Counts of 64 bits, and addresses made anew, would cost the loop more instructions than
  // products.
  const int steps = int((linear.weight_stride + Tiles::kValueBytes - 1) / Tiles::kValueBytes);
  const int x_bytes = int(sparse.x_bytes), value_bytes = int(linear.weight_stride);
  const int chunks = int(sparse.chunks);

  // What this thread copies: from where, in the first stage; null of rows past the last.
  constexpr int kXUnits = Tiles::kXBytes / kCopyBytes, kXCopies = Tiles::kBatch * kXUnits;
  constexpr int kUnits = Tiles::kValueBytes / kCopyBytes, kCopies = Tiles::kWeights * kUnits;
  const uint8_t *x_from[kRounds<kXCopies>] = {}, *values_from[kRounds<kCopies>] = {};
  const uint32_t* indices_from[kRounds<Tiles::kWeights>] = {};
  by_all_threads<kXCopies>([&](int i, int round) {
    const int64_t m = m0 + i / kXUnits;
    if (m < linear.m)
      x_from[round] = reinterpret_cast<const uint8_t*>(linear.q) + m * linear.q_stride +
                      i % kXUnits * kCopyBytes;
  });
  by_all_threads<kCopies>([&](int i, int round) {
    const int64_t n = n0 + i / kUnits;
    if (n < linear.n)
      values_from[round] = linear.weight + n * linear.weight_stride + i % kUnits * kCopyBytes;
  });
  by_all_threads<Tiles::kWeights>([&](int row, int round) {
    if (n0 + row < linear.n) indices_from[round] = sparse.indices + (n0 + row) * sparse.chunks;
  });

  const auto load_group = [&](int number) {
    unsigned char* const group = groups + number % Tiles::kGroups * Tiles::kGroupBytes;
    const int first = number * Tiles::kGroupWords;
    const bool whole = chunks % Tiles::kGroupWords == 0;
    by_all_threads<Tiles::kWeights>([&](int row, int round) {
      const uint32_t* const from = indices_from[round];
      unsigned char* const to = group + row * Tiles::kGroupRowBytes;
      if (whole && from != nullptr && first < chunks) {
        copy_async(shared_address(to), from + first, true);
      } else {
        for (int i = 0; i < Tiles::kGroupWords; ++i)
          reinterpret_cast<uint32_t*>(to)[i] =
              from != nullptr && first + i < chunks ? from[first + i] : kSparse24AnyIndices;
      }
    });
  };
  const auto load_stage = [&](int step) {
    unsigned char* const x = stages + step % kStages * Tiles::kStageBytes;
    unsigned char* const values = x + Tiles::kStageXBytes;
    by_all_threads<kXCopies>([&](int i, int round) {
      const int row = i / kXUnits, unit = i % kXUnits, at = step * Tiles::kXBytes;
      copy_async(shared_address(x + unit_offset(row, unit)), x_from[round] + at,
                 x_from[round] != nullptr && at + unit * kCopyBytes < x_bytes);
    });
    by_all_threads<kCopies>([&](int i, int round) {
      const int row = i / kUnits, unit = i % kUnits, at = step * Tiles::kValueBytes;
      copy_async(shared_address(values + value_unit_offset(row, unit)), values_from[round] + at,
                 values_from[round] != nullptr && at + unit * kCopyBytes < value_bytes);
    });
    if (step % Tiles::kGroupStages == 0) load_group(step / Tiles::kGroupStages);
  };

  const int warp_n = warp % kSparse24WarpsAlong * Tiles::kWarpWeights;
  const int warp_m = warp / kSparse24WarpsAlong * Tiles::kWarpBatch;
  typename Values::Sum sums[kWeightTiles][kBatchTiles][4] = {};
  const auto compute_stage = [&](int step) {
    const unsigned char* const x = stages + step % kStages * Tiles::kStageBytes;
    const unsigned char* const values = x + Tiles::kStageXBytes;
    const unsigned char* const group =
        groups + step / Tiles::kGroupStages % Tiles::kGroups * Tiles::kGroupBytes;
    uint32_t a[kWeightTiles][4], metadata[kWeightTiles];
#pragma unroll
    for (int i = 0; i < kWeightTiles; ++i)
      // Matrices 0 and 1 are rows 0 to 7 and 8 to 15 of the first 16 bytes, 2 and 3 of the next.
      load_matrices(
          a[i], shared_address(values + value_unit_offset(warp_n + 16 * i + lane % 16, lane / 16)));
    load_metadata<Tiles>(metadata, group + warp_n * Tiles::kGroupRowBytes,
                         step % Tiles::kGroupStages * Tiles::kStageWords, lane);
#pragma unroll
    for (int j = 0; j < kBatchTiles; ++j) {
      uint32_t b[4];
      load_matrices(b, shared_address(x + unit_offset(warp_m + 8 * j + lane % 8, lane / 8)));
#pragma unroll
      for (int i = 0; i < kWeightTiles; ++i) {
        if constexpr (!kInt8Values<Values>) {
          if (i % 2 == 1) {
            multiply_sparse<1>(typename Values::Operands{}, sums[i][j], a[i], b, metadata[i]);
            continue;
          }
        }
        multiply_sparse<0>(typename Values::Operands{}, sums[i][j], a[i], b, metadata[i]);
      }
    }
  };

#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) load_stage(stage);
    copy_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    // Everyone's part of this stage has landed, and everyone is done with the one before.
    __syncthreads();
    if (step + kStages - 1 < steps) load_stage(step + kStages - 1);
    copy_async_commit();
    compute_stage(step);
  }

  // Outputs past the last are made up, and not stored.
  float outputs[kWeightTiles][kBatchTiles][4];
#pragma unroll
  for (int i = 0; i < kWeightTiles; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t n = n0 + warp_n + 16 * i + 8 * half + lane / 4;
      const typename Values::Column column = Values::column(linear, n < linear.n ? n : 0);
#pragma unroll
      for (int j = 0; j < kBatchTiles; ++j)
#pragma unroll
        for (int second = 0; second < 2; ++second) {
          const int64_t m = m0 + warp_m + 8 * j + 2 * (lane % 4) + second;
          outputs[i][j][2 * half + second] =
              Values::finish(linear, sums[i][j][2 * half + second], m < linear.m ? m : 0, column);
        }
    }

  copy_async_wait<0>();
  __syncthreads();  // the stages become staging
  const auto store = [&]<class T>() {
    constexpr int kStagingBytes = 16 * (Tiles::kWarpWeights * int(sizeof(T)) + 16);
    static_assert(kSparse24Threads / kWarpThreads * kStagingBytes <= Tiles::kDynamicBytes);
    store_tiles<Tiles, T>(linear, m0 + warp_m, n0 + warp_n, outputs, stages + warp * kStagingBytes);
  };
  if constexpr (kInt8Values<Values>) {
    if (linear.type == FloatType::float32)
      store.template operator()<float>();
    else if (linear.type == FloatType::bfloat16)
      store.template operator()<bfloat16>();
    else
      store.template operator()<float16>();
  } else {
    store.template operator()<typename Values::Element>();
  }
}

template <class Values>
void sparse24_tiles(const DeviceSparse24& sparse, cudaStream_t stream) {
  // Stages that fit sm_89's 99 KB; twice, but for the largest, sm_80's 163 KB.
  using Large = Sparse24Tiles<Values, 64, 64, 5>;
  using Medium = Sparse24Tiles<Values, 32, 32, 8>;
  using Small = Sparse24Tiles<Values, 16, 32, 8>;
  const auto blocks = [&]<class Tiles>(Tiles) {
    const auto tiles = [](int64_t count, int size) { return (count + size - 1) / size; };
    return tiles(sparse.linear.m, Tiles::kBatch) * tiles(sparse.linear.n, Tiles::kWeights);
  };
  const auto run = [&]<class Tiles>(Tiles tiles) {
    launch("sparse24_linear", sparse24_tiles_kernel<Tiles>,
           {blocks(tiles), kSparse24Threads, Tiles::kDynamicBytes}, stream, sparse);
  };
  const int64_t all = multiprocessors();
  if (sparse.linear.m > Medium::kBatch && blocks(Large{}) >= all)
    run(Large{});
  else if (blocks(Medium{}) >= all)
    run(Medium{});
  else
    run(Small{});
}

}  // namespace trine
