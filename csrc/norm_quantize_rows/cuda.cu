// norm_quantize_rows for every GPU from sm_80 on: memory-bound, so each value of x is read once and
// stays in registers through all steps: the sums, the norm, the quantisation.
#include "norm_quantize_rows/cuda.h"

#include "common/cuda/launch.cuh"
#include "common/cuda/registers.cuh"
#include "norm_quantize_rows/norm_quantize_rows.h"
#include "quantize_rows/rows.cuh"

namespace trine {
namespace {

// The most threads that work on a row (of 1024, each would have too few registers); where they hold
// less than all of it, values kSumLanes apart meet in one thread.
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

// Sums of a thread: its chunks, or those that are not kSumLanes apart.
template <class T, class Share>
constexpr int kThreadSums =
    Share::kMayBeLonger ? int(kSumLanes) / (kMostRowThreads * kChunkValues<T>) : kHeldChunks;

// S of the row of `share`, whose chunks are `held`, of what value(chunk, c, j) makes of value j of
// chunk c. `warp_sums`: kThreadSums for each warp, for one call only.
template <class T, class Share, int kRowThreads, class Value>
__device__ __forceinline__ float sum_of(const Share& share, const Chunk<T> (&held)[kHeldChunks],
                                        float* warp_sums, const Value& value) {
  constexpr int kValues = kChunkValues<T>, kWarps = Share::kRowWarps;
  constexpr int kSums = kThreadSums<T, Share>;
  static_assert(kHeldChunks % kSums == 0);

  float values[kSums][kValues];
  const auto add = [&](int i, const Chunk<T>& chunk, int64_t c, bool first) {
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      const float one = value(chunk, c, j);
      values[i][j] = first ? one : values[i][j] + one;
    }
  };
#pragma unroll
  for (int i = 0; i < kHeldChunks; ++i)
    add(i % kSums, held[i], share.thread + i * kRowThreads, i < kSums);
  if constexpr (Share::kMayBeLonger)
#pragma unroll 1
    for (int64_t c = share.first_not_held; c < share.chunks; c += kSums * kRowThreads)
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const int64_t at = c + i * kRowThreads;
        if (at < share.chunks) add(i, share.load(at), at, false);
      }

  // The values of a chunk, the chunks of neighbouring lanes, of neighbouring warps, then a
  // thread's.
  float sums[kSums];
  const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    sums[i] = sum_lanes_pairwise<(kRowThreads < kWarpThreads ? kRowThreads : kWarpThreads)>(
        sum_pairwise(values[i]));
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

// Those of chunk `c` of x, zeros behind the row's end; `absent` each where there are none.
template <class T, bool kWide>
__device__ __forceinline__ void load_parameter(const ParameterOnDevice& parameter, float absent,
                                               int64_t k, int64_t c,
                                               float (&values)[kChunkValues<T>]) {
  const auto read = [&]<class W>(W) {
    constexpr int kParts = kChunkValues<T> / kChunkValues<W>;
    const char* from = static_cast<const char*>(parameter.values);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const Chunk<W> chunk = load_chunk<W, kWide>(from, k, c * kParts + part);
#pragma unroll
      for (int j = 0; j < kChunkValues<W>; ++j)
        values[part * kChunkValues<W> + j] = value_of(chunk, j);
    }
  };
  if (parameter.values == nullptr) {
#pragma unroll
    for (float& value : values) value = absent;
  } else if (parameter.is_float) {
    read(float{});
  } else {
    read(T{});
  }
}

// Between two uses of what is held: without it the compiler keeps what it widened, and its distance
// from the centre, until the second, with up to twice the registers.
template <class T>
__device__ __forceinline__ void keep_packed(Chunk<T> (&held)[kHeldChunks], float& centre) {
  uint32_t bits = __float_as_uint(centre);
  forget_origin(bits);
  centre = __uint_as_float(bits);
  if constexpr (sizeof(T) < sizeof(uint32_t))
#pragma unroll
    for (Chunk<T>& chunk : held)
#pragma unroll
      for (uint32_t& word : chunk.word) forget_origin(word);
}

__device__ __forceinline__ uint32_t narrowed_bits(float, float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint32_t narrowed_bits(bfloat16, float x) {
  return narrow_to_bfloat16(x).bits;
}
__device__ __forceinline__ uint32_t narrowed_bits(float16, float x) {
  return narrow_to_float16(x).bits;
}

// Of 512 threads one block has loads enough in flight for an SM; not told so, the compiler spills
// registers of some kernels to fit two.
template <Norm kNorm, class T, bool kWide, int kRowThreads, int kBlockThreads>
__global__ void __launch_bounds__(kBlockThreads, 1)
    norm_quantize_rows_kernel(RowsToQuantize problem, NormOnDevice norm) {
  using Share = RowShare<T, kWide, kRowThreads, kBlockThreads, kMostRowThreads>;
  constexpr int kWarpSums = kThreadSums<T, Share> * Share::kRowWarps;
  TRINE_SHARED_ARRAY(float, sums_of_x, kWarpSums);
  TRINE_SHARED_ARRAY(float, sums_of_squares, kWarpSums);
  const Share share{problem};
  Chunk<T> held[kHeldChunks] = {};
  share.for_held([&](int i, int64_t c) { held[i] = share.load(c); });

  float centre = 0.0f;
  if constexpr (kNorm == Norm::layer) {
    centre = sum_of<T, Share, kRowThreads>(
                 share, held, sums_of_x,
                 [](const Chunk<T>& chunk, int64_t, int j) { return value_of(chunk, j); }) /
             float(problem.k);
    keep_packed(held, centre);
  }
  const auto centred = [&](const Chunk<T>& chunk, int j) {
    return kNorm == Norm::rms ? value_of(chunk, j) : value_of(chunk, j) - centre;
  };
  // Behind the row x counts as 0, which is far from the centre.
  const auto is_missing = [&](int64_t c, int j) {
    return kNorm == Norm::layer &&
           (kWide ? c >= share.chunks : c * kChunkValues<T> + j >= problem.k);
  };
  const auto square = [&](const Chunk<T>& chunk, int64_t c, int j) {
    const float value = centred(chunk, j);
    return is_missing(c, j) ? 0.0f : value * value;
  };
  const float mean =
      sum_of<T, Share, kRowThreads>(share, held, sums_of_squares, square) / float(problem.k);
  keep_packed(held, centre);
  const float r = 1.0f / sqrtf(mean + norm.eps);
  const auto normalize = [&](const Chunk<T>& chunk, int64_t c) {
    float parameter[kChunkValues<T>], normed[kChunkValues<T>];
    load_parameter<T, kWide>(norm.weight, 1.0f, problem.k, c, parameter);  // x * 1 is exact
#pragma unroll
    for (int i = 0; i < kChunkValues<T>; ++i) normed[i] = (centred(chunk, i) * r) * parameter[i];
    if constexpr (kNorm == Norm::layer) {
      load_parameter<T, kWide>(norm.bias, 0.0f, problem.k, c, parameter);
#pragma unroll
      for (int i = 0; i < kChunkValues<T>; ++i)
        normed[i] = is_missing(c, i) ? 0.0f : normed[i] + parameter[i];
    }
    Chunk<T> y = {};
#pragma unroll
    for (int i = 0; i < kChunkValues<T>; ++i) {
      const int at = i * int(sizeof(T));
      y.word[at / 4] |= narrowed_bits(T{}, normed[i]) << at % 4 * 8;
    }
    return y;
  };
  share.for_held([&](int i, int64_t c) { held[i] = normalize(held[i], c); });
  share.quantize(held, [&](int64_t c) { return normalize(share.load(c), c); });
}

template <class T, bool kWide>
void norm_quantize_rows(const RowsToQuantize& problem, const NormOnDevice& norm,
                        cudaStream_t stream) {
  with_row_threads<T, kMostRowThreads>(
      problem, [&]<int kRowThreads, int kBlockThreads>(int64_t blocks) {
        const auto kernel =
            norm.norm == Norm::rms
                ? norm_quantize_rows_kernel<Norm::rms, T, kWide, kRowThreads, kBlockThreads>
                : norm_quantize_rows_kernel<Norm::layer, T, kWide, kRowThreads, kBlockThreads>;
        launch("norm_quantize_rows", kernel, {blocks, kBlockThreads}, stream, problem, norm);
      });
}

}  // namespace

void norm_quantize_rows_cuda(const void* x, FloatType type, int64_t m, int64_t k, int64_t row_bytes,
                             const NormOnDevice& norm, const QuantizedOnDevice& to,
                             cudaStream_t stream) {
  if (m == 0) return;
  const RowsToQuantize problem = {
      static_cast<const char*>(x), type, m, k, row_bytes, to.q, to.width, to.scale, to.sum};
  const auto is_aligned = [](const ParameterOnDevice& parameter) {
    return reinterpret_cast<uintptr_t>(parameter.values) % kChunkBytes == 0;
  };
  const bool aligned = is_aligned(norm.weight) && is_aligned(norm.bias);
  with_type_of_x(problem, [&]<class T>(T) {
    if (aligned && chunks_are_aligned<T>(problem))
      norm_quantize_rows<T, true>(problem, norm, stream);
    else
      norm_quantize_rows<T, false>(problem, norm, stream);
  });
}

}  // namespace trine
