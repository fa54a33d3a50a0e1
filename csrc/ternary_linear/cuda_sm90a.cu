// ternary_linear for many rows on sm_90a: wgmma with the weight decoded in registers.
//
// Operands are swapped: A, which wgmma takes from registers, is the weight, B the activations. So
// the codes stay packed until a lane shifts and masks the words that it multiplies: no decoded copy
// is written anywhere. A block computes 128 columns of y (rows of the weight) x 256 rows at a time
// (pipeline.cuh says who does what), each consumer warpgroup 64 of the weight rows. The blocks of a
// cluster have the same rows: they share the activations.
//
// Two rings in shared memory: activations, 256 rows x 128 k (32 KB) four deep, and packed weights,
// 128 rows x 512 k (16 KB) two deep: a row of 128 bytes of them serves four steps.
//
// What bounds it: the tensor cores, as long as the warpgroups take turns: one decodes (16 registers
// a lane and step, some 40 instructions) while the other's products run. Within a warpgroup the two
// cannot overlap: ptxas serialises products whose registers are written while others are pending.
#include <type_traits>

#include "common/cuda/finish.cuh"
#include "common/cuda/pipeline.cuh"
#include "common/cuda/wgmma.cuh"
#include "ternary_linear/cuda.h"
#include "ternary_linear/ternary_linear.h"

namespace trine {
namespace sm90a {
namespace {

constexpr int kTileWeights = 128, kTileRows = 256;
constexpr int kStages = 4, kStageBytes = kTileRows * kTileRowBytes;
constexpr int kPackedStages = 2, kPackedBytes = kTileWeights * kTileRowBytes;
constexpr int kStepsOfPacked = int(kTernaryPerByte);  // steps of 128 k that a packed tile serves
constexpr int kProducts = 4;                          // of 32 k, in a step
constexpr int kStepBytes = 32;
constexpr int32_t kOffset = 1;

// A warp's 16 columns of y leave through shared memory, 32 rows at a time. 16 more bytes from row
// to row spread them over the banks.
constexpr int kWarpWeights = 16, kPartRows = 32;
template <class T>
constexpr int kOutBytes = kWarpWeights * int(sizeof(T));
template <class T>
constexpr int kOutStride = kOutBytes<T> + 16;
constexpr int kStagingBytes = kPartRows * kOutStride<float>;  // of a warp
constexpr int kDynamicBytes =
    kStages * kStageBytes + kPackedStages * kPackedBytes + kConsumerWarps * kStagingBytes;

using Fragments = uint32_t[kProducts][4];

// The codes of one step: the words of weight rows `row` and row + 8 of the tile. A word holds 16
// k, and lane q of four takes its codes 4q to 4q + 3; each product takes two words.
__device__ __forceinline__ void decode(Fragments& a, const unsigned char* packed, int row,
                                       int step_in_tile, int quarter) {
#pragma unroll
  for (int product = 0; product < kProducts; ++product)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t at = uint32_t((row + 8 * half) * kTileRowBytes +
                                   step_in_tile * kTileRowBytes / kStepsOfPacked + 8 * product);
      const uint2 words = *reinterpret_cast<const uint2*>(packed + swizzled(at));
      a[product][half] = words.x >> 2 * quarter & 0x03030303u;
      a[product][half + 2] = words.y >> 2 * quarter & 0x03030303u;
    }
}

// The 16 columns from n0 on and 256 rows from m0 on that a warp holds, transposed by way of
// `staging`, the warp's own. What is to be activated stays float until then.
template <class T, bool kActivates>
__device__ __forceinline__ void store_sums(const DeviceLinear& linear, int64_t m0, int64_t n0,
                                           const int32_t (&sums)[kTileRows / 2],
                                           unsigned char* staging) {
  using Staged = std::conditional_t<kActivates, float, T>;
  const int lane = int(threadIdx.x) % kWarpThreads;
  ColumnScaling scaling[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half)
    if (n0 + 8 * half + lane / 4 < linear.n)
      scaling[half] = column_scaling(linear, n0 + 8 * half + lane / 4);
#pragma unroll
  for (int part = 0; part < kTileRows / kPartRows; ++part) {
#pragma unroll
    for (int j = 0; j < kPartRows / 8; ++j)
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int row = 8 * j + 2 * (lane % 4) + column;
        const int64_t m = m0 + part * kPartRows + row;
        if (m >= linear.m) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half)
          write_float(
              reinterpret_cast<Staged*>(staging + row * kOutStride<Staged>) + 8 * half + lane / 4,
              finished<kOffset>(linear, sums[(part * (kPartRows / 8) + j) * 4 + 2 * half + column],
                                m, scaling[half]));
      }
    __syncwarp();
    if constexpr (kActivates)
      store_activated_rows<kPartRows, kOutBytes<float>, kOutStride<float>>(
          linear, m0 + part * kPartRows, n0, staging);
    else
      store_rows<T, kPartRows, kOutBytes<T>, kOutStride<T>>(linear, m0 + part * kPartRows, n0,
                                                            staging);
    __syncwarp();
  }
}

template <class T>
__global__ void __launch_bounds__(kRolesThreads, 1)
    wgmma_kernel(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
                 const __grid_constant__ TiledLinear problem) {
  TRINE_DYNAMIC_SHARED(shared);
  TRINE_SHARED_ARRAY(Mbarrier, landed, kStages + kPackedStages);
  TRINE_SHARED_ARRAY(Mbarrier, free, kStages + kPackedStages);
  const Ring<kStages, kStageBytes, kCluster> ring = {shared_address(shared), shared_address(landed),
                                                     shared_address(free)};
  unsigned char* const packed_tiles = shared + kStages * kStageBytes;
  const Ring<kPackedStages, kPackedBytes, 1> packed_ring = {shared_address(packed_tiles),
                                                            shared_address(landed + kStages),
                                                            shared_address(free + kStages)};
  // Of the tile that this block computes of its cluster's.
  const auto first_column = [](const RasterPosition& tile) {
    return (tile.column * kCluster + cluster_rank()) * kTileWeights;
  };
  int64_t used = 0, packed_used = 0;

  const auto init = [&] {
    ring.init();
    packed_ring.init();
    prefetch_tensor_map(x_map);
    prefetch_tensor_map(w_map);
  };
  const auto produce = [&](const RasterPosition& tile) {
    for (int step = 0; step < problem.steps; ++step, ++used) {
      if (step % kStepsOfPacked == 0) {
        const auto packed = packed_ring.claim(packed_used++);
        load_tile(packed.tile, w_map, step / kStepsOfPacked * kTileRowBytes,
                  int(first_column(tile)), packed.landed);
      }
      const auto stage = ring.claim(used);
      load_shared_tile<kTileRows>(stage.tile, x_map, step * kTileRowBytes,
                                  int(tile.row) * kTileRows, stage.landed);
    }
  };
  const auto consume = [&](const RasterPosition& tile) {
    const int warp = (int(threadIdx.x) - kGroupThreads) / kWarpThreads;
    const int lane = int(threadIdx.x) % kWarpThreads;
    int32_t sums[kTileRows / 2];
    for (int step = 0; step < problem.steps; ++step, ++used) {
      if (step % kStepsOfPacked == 0) packed_ring.await(packed_used);
      Fragments a;
      decode(a, packed_tiles + packed_used % kPackedStages * kPackedBytes,
             warp * kWarpWeights + lane / 4, step % kStepsOfPacked, lane % 4);
      if (step % kStepsOfPacked == kStepsOfPacked - 1 || step + 1 == problem.steps) {
        __syncwarp();  // all lanes have read it
        packed_ring.release(packed_used++);
      }
      const auto stage = ring.await(used);
      wgmma_fence();
#pragma unroll
      for (int product = 0; product < kProducts; ++product)
        wgmma(S8{}, sums, a[product], tile_descriptor(stage.tile + product * kStepBytes),
              step > 0 || product > 0);
      wgmma_commit();
      wgmma_wait<0>();
      touch(sums);
      ring.release(used);
    }
    const int64_t m0 = tile.row * kTileRows, n0 = first_column(tile) + warp * kWarpWeights;
    unsigned char* const staging =
        packed_tiles + kPackedStages * kPackedBytes + warp * kStagingBytes;
    if (problem.linear.activation == Activation::none)
      store_sums<T, false>(problem.linear, m0, n0, sums, staging);
    else
      store_sums<T, true>(problem.linear, m0, n0, sums, staging);
  };
  run_roles(problem, init, produce, consume);
}

template <class T>
void run(const DeviceLinear& linear, cudaStream_t stream) {
  const char* op = "ternary_linear";
  const auto tiles = [](int64_t count, int size) { return (count + size - 1) / size; };
  const TiledLinear problem = {linear, tiles(linear.m, kTileRows),
                               tiles(linear.n, kTileWeights * kCluster),
                               int(tiles(linear.weight_stride * kTernaryPerByte, kTileRowBytes))};
  const TensorMap x_map = make_tensor_map(op, linear.q, linear.m, linear.q_stride, linear.q_stride,
                                          kTileRows / kCluster);
  const TensorMap w_map = make_tensor_map(op, linear.weight, linear.n, linear.weight_stride,
                                          linear.weight_stride, kTileWeights);
  launch_roles(op, wgmma_kernel<T>, problem, kDynamicBytes, stream, x_map, w_map);
}

}  // namespace
}  // namespace sm90a

void ternary_linear_cuda_sm90a(const DeviceLinear& linear, cudaStream_t stream) {
  switch (linear.type) {
    case FloatType::float32:
      return sm90a::run<float>(linear, stream);
    case FloatType::bfloat16:
      return sm90a::run<bfloat16>(linear, stream);
    case FloatType::float16:
      return sm90a::run<float16>(linear, stream);
  }
}

}  // namespace trine
