// rms_norm_quantize_rows for every GPU from sm_80 on: memory-bound, so each value of x is read once
// and stays in registers through three steps: the sum of its square, the norm, the quantisation.
#include "rms_norm_quantize_rows/cuda.h"

#include "common/cuda/launch.cuh"
#include "quantize_rows/rows.cuh"
#include "rms_norm_quantize_rows/rms_norm_quantize_rows.h"

namespace trine {
namespace {

// The most threads that work on a row (of 1024, each would have too few registers); where they hold
// less than all of it, squares kSumLanes apart meet in one thread.
constexpr int kMostRowThreads = 512;

// Of the neighbours of an array, of the neighbours of those sums, and so on.
template <int kCount>
__device__ __forceinline__ float sum_pairwise(float (&values)[kCount]) {
#pragma unroll
  for (int left = kCount / 2; left > 0; left /= 2)
#pragma unroll
    for (int i = 0; i < left; ++i) values[i] = values[2 * i] + values[2 * i + 1];
  return values[0];
}

// The same over kLanes consecutive lanes; every lane gets the result, because a + b is b + a.
template <int kLanes>
__device__ __forceinline__ float sum_lanes_pairwise(float value) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2)
    value = value + __shfl_xor_sync(kWholeWarp, value, step);
  return value;
}

// Of the row of `share`, whose chunks are `held`.
template <class T, class Share, int kRowThreads>
__device__ __forceinline__ float sum_of_squares(const Share& share,
                                                const Chunk<T> (&held)[kHeldChunks]) {
  constexpr int kValues = kChunkValues<T>, kWarps = Share::kRowWarps;
  // Sums of a thread: its chunks, or those that are not kSumLanes apart.
  constexpr int kSums =
      Share::kMayBeLonger ? int(kSumLanes) / (kMostRowThreads * kValues) : kHeldChunks;
  static_assert(kHeldChunks % kSums == 0);
  constexpr int kWarpSums = kSums * kWarps;
  TRINE_SHARED_ARRAY(float, warp_sums, kWarpSums);

  float squares[kSums][kValues];
  const auto add = [&](int i, const Chunk<T>& chunk, bool first) {
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      const float value = value_of(chunk, j), square = value * value;
      squares[i][j] = first ? square : squares[i][j] + square;
    }
  };
#pragma unroll
  for (int i = 0; i < kHeldChunks; ++i) add(i % kSums, held[i], i < kSums);
  if constexpr (Share::kMayBeLonger)
#pragma unroll 1
    for (int64_t c = share.first_not_held; c < share.chunks; c += kSums * kRowThreads)
#pragma unroll
      for (int i = 0; i < kSums; ++i)
        if (c + i * kRowThreads < share.chunks) add(i, share.load(c + i * kRowThreads), false);

  // The values of a chunk, the chunks of neighbouring lanes, of neighbouring warps, then a
  // thread's.
  float sums[kSums];
  const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    sums[i] = sum_lanes_pairwise<(kRowThreads < kWarpThreads ? kRowThreads : kWarpThreads)>(
        sum_pairwise(squares[i]));
    if (kWarps > 1 && lane == 0) warp_sums[i * kWarps + threadIdx.x / kWarpThreads] = sums[i];
  }
  if constexpr (kWarps > 1) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSums; ++i)
      sums[i] = sum_lanes_pairwise<kWarps>(warp_sums[i * kWarps + lane % kWarps]);
  }
  return sum_pairwise(sums);
}

template <class T, bool kWide>
struct Weights {
  const NormOnDevice& norm;
  int64_t k;

  // Those of chunk `c` of x, zeros behind the row's end.
  __device__ __forceinline__ void load(int64_t c, float (&values)[kChunkValues<T>]) const {
    const auto read = [&]<class W>(W) {
      constexpr int kParts = kChunkValues<T> / kChunkValues<W>;
      const char* from = static_cast<const char*>(norm.weight);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const Chunk<W> chunk = load_chunk<W, kWide>(from, k, c * kParts + part);
#pragma unroll
        for (int j = 0; j < kChunkValues<W>; ++j)
          values[part * kChunkValues<W> + j] = value_of(chunk, j);
      }
    };
    if (norm.weight == nullptr) {
#pragma unroll
      for (float& value : values) value = 1.0f;  // a product by 1 is exact
    } else if (norm.weight_is_float) {
      read(float{});
    } else {
      read(T{});
    }
  }
};

__device__ __forceinline__ uint32_t narrowed_bits(float, float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint32_t narrowed_bits(bfloat16, float x) {
  return narrow_to_bfloat16(x).bits;
}
__device__ __forceinline__ uint32_t narrowed_bits(float16, float x) {
  return narrow_to_float16(x).bits;
}

template <class T, bool kWide, int kRowThreads, int kBlockThreads>
__global__ void __launch_bounds__(kBlockThreads)
    rms_norm_quantize_rows_kernel(RowsToQuantize problem, NormOnDevice norm) {
  using Share = RowShare<T, kWide, kRowThreads, kBlockThreads, kMostRowThreads>;
  const Share share{problem};
  Chunk<T> held[kHeldChunks] = {};
  share.for_held([&](int i, int64_t c) { held[i] = share.load(c); });

  const float mean = sum_of_squares<T, Share, kRowThreads>(share, held) / float(problem.k);
  const float r = 1.0f / sqrtf(mean + norm.eps);
  const Weights<T, kWide> weights{norm, problem.k};
  const auto normalize = [&](const Chunk<T>& chunk, int64_t c) {
    float weight[kChunkValues<T>];
    weights.load(c, weight);
    Chunk<T> y = {};
#pragma unroll
    for (int i = 0; i < kChunkValues<T>; ++i) {
      const int at = i * int(sizeof(T));
      const float normed = (value_of(chunk, i) * r) * weight[i];
      y.word[at / 4] |= narrowed_bits(T{}, normed) << at % 4 * 8;
    }
    return y;
  };
  share.for_held([&](int i, int64_t c) { held[i] = normalize(held[i], c); });
  share.quantize(held, [&](int64_t c) { return normalize(share.load(c), c); });
}

template <class T, bool kWide>
void rms_norm_quantize_rows(const RowsToQuantize& problem, const NormOnDevice& norm,
                            cudaStream_t stream) {
  with_row_threads<T, kMostRowThreads>(
      problem, [&]<int kRowThreads, int kBlockThreads>(int64_t blocks) {
        launch("rms_norm_quantize_rows",
               rms_norm_quantize_rows_kernel<T, kWide, kRowThreads, kBlockThreads>,
               {blocks, kBlockThreads}, stream, problem, norm);
      });
}

}  // namespace

void rms_norm_quantize_rows_cuda(const void* x, FloatType type, int64_t m, int64_t k,
                                 int64_t row_bytes, const NormOnDevice& norm,
                                 const QuantizedOnDevice& to, cudaStream_t stream) {
  if (m == 0) return;
  const RowsToQuantize problem = {
      static_cast<const char*>(x), type, m, k, row_bytes, to.q, to.width, to.scale, to.sum};
  const bool aligned_weight = reinterpret_cast<uintptr_t>(norm.weight) % kChunkBytes == 0;
  with_type_of_x(problem, [&]<class T>(T) {
    if (aligned_weight && chunks_are_aligned<T>(problem))
      rms_norm_quantize_rows<T, true>(problem, norm, stream);
    else
      rms_norm_quantize_rows<T, false>(problem, norm, stream);
  });
}

}  // namespace trine
