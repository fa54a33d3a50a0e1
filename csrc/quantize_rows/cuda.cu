// quantize_rows for every GPU from sm_80 on: memory-bound, so each value is read once and kept in
// registers between the two steps, the row's largest magnitude and the quantisation by it.
#include "quantize_rows/cuda.h"

#include "common/cuda/finish.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/reduce.cuh"
#include "quantize_rows/quantize_rows.h"

namespace trine {
namespace {

// What a thread works on at a time: the widest access there is.
constexpr int kChunkBytes = 16;

template <class T>
constexpr int kChunkValues = kChunkBytes / int(sizeof(T));

// As words, not as values: the compiler then leaves 16-bit values packed until they are used.
template <class T>
struct alignas(kChunkBytes) Chunk {
  uint32_t word[kChunkBytes / 4];
};

template <class T>
struct alignas(kChunkValues<T>) QuantizedChunk {
  uint32_t word[kChunkValues<T> / 4];  // four q in each
};

// Chunks of a row that a thread keeps in registers. Four make kernels of at most 48 registers: an
// SM then holds 1280 threads with 80 KB of loads in flight, more than the latency of memory times
// the bandwidth that falls to one SM (some 25 KB on H200).
constexpr int kHeldChunks = 4;

struct Problem {
  const char* x;
  FloatType type;
  int64_t m, k, row_bytes;
  int8_t* q;
  int64_t q_width;  // of a row of q, which lie one after the other; zero from k on
  float* scale;
  int32_t* sum;
};

// Chunk `c` of the row that begins at `row`. Wide: in one access, which needs rows of whole,
// aligned chunks. Otherwise value by value, with zeros behind the row's end.
template <class T, bool kWide>
__device__ __forceinline__ Chunk<T> load_chunk(const char* row, int64_t k, int64_t c) {
  Chunk<T> chunk = {};
  const char* from = row + c * kChunkBytes;
  if constexpr (kWide) {
    load_global<kChunkBytes>(&chunk, from);
  } else {
#pragma unroll
    for (int i = 0; i < kChunkValues<T>; ++i)
      if (c * kChunkValues<T> + i < k) {
        const int at = i * int(sizeof(T));
        uint32_t value = 0;
        load_global<int(sizeof(T))>(&value, from + at);
        chunk.word[at / 4] |= value << at % 4 * 8;
      }
  }
  return chunk;
}

template <class T, bool kWide>
__device__ __forceinline__ void store_chunk(int8_t* row, int64_t k, int64_t c,
                                            const QuantizedChunk<T>& chunk) {
  int8_t* to = row + c * kChunkValues<T>;
  if constexpr (kWide) {
    store_global<kChunkValues<T>>(to, &chunk);
  } else {
#pragma unroll
    for (int i = 0; i < kChunkValues<T>; ++i)
      if (c * kChunkValues<T> + i < k) {
        const uint32_t q = chunk.word[i / 4] >> i % 4 * 8;
        store_global<1>(to + i, &q);
      }
  }
}

template <class T>
__device__ __forceinline__ float value_of(const Chunk<T>& chunk, int i) {
  if constexpr (sizeof(T) == 4)
    return __uint_as_float(chunk.word[i]);
  else
    return widen_on_device(T{uint16_t(chunk.word[i / 2] >> i % 2 * 16)});
}

// Without their sign the bits of floats order as integers do, with infinity above every number and
// NaN above infinity: one maximum finds the largest magnitude and whether all of them are finite.
constexpr uint32_t kMagnitudeBits = 0x7fffffffu;
constexpr uint32_t kInfinityBits = 0x7f800000u;

template <class T>
__device__ __forceinline__ uint32_t largest_magnitude(const Chunk<T>& chunk, uint32_t largest) {
#pragma unroll
  for (int i = 0; i < kChunkValues<T>; ++i)
    largest = Maximum{}(largest, __float_as_uint(value_of(chunk, i)) & kMagnitudeBits);
  return largest;
}

// 1.5 * 2^23: floats of this size are one apart, so that adding it rounds to an integer, half to
// even, and leaves that integer's two's complement in the low bits.
constexpr float kRoundsToInteger = 12582912.0f;

// Nothing to clamp: |x * (127 / absmax)| <= 127 * (1 + 2^-24)^2, which rounds to 127 at most.
__device__ __forceinline__ uint32_t quantize_to_low_byte(float x, float to_q) {
  return __float_as_uint(x * to_q + kRoundsToInteger);
}

// The q of a chunk, and their sum added to `total`. `keep` is all ones, or 0 to make every q 0.
template <class T>
__device__ __forceinline__ QuantizedChunk<T> quantize_chunk(const Chunk<T>& chunk, float to_q,
                                                            uint32_t keep, int32_t& total) {
  QuantizedChunk<T> q;
#pragma unroll
  for (int i = 0; i < kChunkValues<T>; i += 4) {
    uint32_t byte[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) byte[j] = quantize_to_low_byte(value_of(chunk, i + j), to_q);
    const uint32_t low = __byte_perm(byte[0], byte[1], 0x0040);  // bytes 0 of both, side by side
    const uint32_t high = __byte_perm(byte[2], byte[3], 0x0040);
    const uint32_t four = __byte_perm(low, high, 0x5410) & keep;  // bytes 0 and 1 of both
    total = __dp4a(int32_t(four), 0x01010101, total);
    q.word[i / 4] = four;
  }
  return q;
}

// kRowThreads threads work on a row. A row has no more chunks than they hold, except where
// kRowThreads is the largest: what is beyond is then read a second time (from the L2 cache).
template <class T, bool kWide, int kRowThreads, int kBlockThreads>
__global__ void __launch_bounds__(kBlockThreads) quantize_rows_kernel(Problem problem) {
  constexpr int kRowsPerBlock = kBlockThreads / kRowThreads;
  constexpr int kRowWarps = (kRowThreads + kWarpThreads - 1) / kWarpThreads;
  TRINE_SHARED_ARRAY(uint32_t, warp_largest, kRowWarps);
  TRINE_SHARED_ARRAY(int32_t, warp_total, kRowWarps);

  const int thread = threadIdx.x % kRowThreads;
  const int64_t m = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kRowThreads;
  // Threads behind the last row have no chunks, but take part in the reductions.
  const bool has_row = m < problem.m;
  const int64_t chunks = has_row ? (problem.k + kChunkValues<T> - 1) / kChunkValues<T> : 0;
  const char* x = problem.x + m * problem.row_bytes;
  int8_t* q = problem.q + m * problem.q_width;
  const int64_t first_not_held = thread + kHeldChunks * kRowThreads;

  Chunk<T> held[kHeldChunks] = {};
#pragma unroll
  for (int i = 0; i < kHeldChunks; ++i) {
    const int64_t c = thread + i * kRowThreads;
    if (c < chunks) held[i] = load_chunk<T, kWide>(x, problem.k, c);
  }
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kHeldChunks; ++i) largest = largest_magnitude(held[i], largest);
#pragma unroll 1
  for (int64_t c = first_not_held; c < chunks; c += kRowThreads)
    largest = largest_magnitude(load_chunk<T, kWide>(x, problem.k, c), largest);
  largest = reduce_threads<kRowThreads>(largest, Maximum{}, warp_largest);

  const float absmax = __uint_as_float(largest);
  const bool finite = largest < kInfinityBits;
  const bool zero = absmax < kSmallestAbsmax;
  const uint32_t keep = finite && !zero ? ~0u : 0u;
  const float to_q = 127.0f / absmax;

  int32_t total = 0;
#pragma unroll
  for (int i = 0; i < kHeldChunks; ++i) {
    const int64_t c = thread + i * kRowThreads;
    if (c < chunks)
      store_chunk<T, kWide>(q, problem.k, c, quantize_chunk(held[i], to_q, keep, total));
  }
#pragma unroll 1
  for (int64_t c = first_not_held; c < chunks; c += kRowThreads)
    store_chunk<T, kWide>(q, problem.k, c,
                          quantize_chunk(load_chunk<T, kWide>(x, problem.k, c), to_q, keep, total));
  total = reduce_threads<kRowThreads>(total, Sum{}, warp_total);

  const uint32_t padding = 0;
  for (int64_t i = problem.k + thread; has_row && i < problem.q_width; i += kRowThreads)
    store_global<1>(q + i, &padding);
  if (has_row && thread == 0) {
    problem.scale[m] = zero ? 0.0f : finite ? absmax / 127.0f : __uint_as_float(kMagnitudeBits);
    problem.sum[m] = total;
  }
}

template <class T, bool kWide>
void quantize_rows(const Problem& problem, cudaStream_t stream) {
  const int64_t chunks = (problem.k + kChunkValues<T> - 1) / kChunkValues<T>;
  const auto run = [&]<int kRowThreads, int kBlockThreads>() {
    constexpr int kRowsPerBlock = kBlockThreads / kRowThreads;
    launch("quantize_rows", quantize_rows_kernel<T, kWide, kRowThreads, kBlockThreads>,
           {(problem.m + kRowsPerBlock - 1) / kRowsPerBlock, kBlockThreads}, stream, problem);
  };
  // The fewest threads that hold the row, each step four times the last. Eight are the least that
  // read whole 128-byte lines; a block has 128 threads or more, so that 16 blocks fill an SM.
  if (chunks <= 8 * kHeldChunks)
    run.template operator()<8, 128>();
  else if (chunks <= 32 * kHeldChunks)
    run.template operator()<32, 128>();
  else if (chunks <= 128 * kHeldChunks)
    run.template operator()<128, 128>();
  else if (chunks <= 512 * kHeldChunks)
    run.template operator()<512, 512>();
  else
    run.template operator()<1024, 1024>();
}

// Rows of whole chunks, each of them aligned in x and in q: torch's own memory is aligned to more,
// so this asks for a K that is a multiple of 8 (4 in float32) and a row stride that is one.
template <class T>
bool chunks_are_aligned(const Problem& problem) {
  return problem.k % kChunkValues<T> == 0 && problem.q_width % kChunkValues<T> == 0 &&
         problem.row_bytes % kChunkBytes == 0 &&
         reinterpret_cast<uintptr_t>(problem.x) % kChunkBytes == 0 &&
         reinterpret_cast<uintptr_t>(problem.q) % kChunkValues<T> == 0;
}

template <class T>
void quantize_rows_of(const Problem& problem, cudaStream_t stream) {
  if (chunks_are_aligned<T>(problem))
    quantize_rows<T, true>(problem, stream);
  else
    quantize_rows<T, false>(problem, stream);
}

// With one scale and zero point for the whole tensor. A block works on a row: first on whether all
// of it is finite, then on the values, four by four.
constexpr int kStaticThreads = 256;

__global__ void __launch_bounds__(kStaticThreads)
    quantize_rows_static_kernel(Problem problem, StaticScaleOnDevice fixed) {
  const int64_t m = blockIdx.x;
  const char* x = problem.x + m * problem.row_bytes;
  bool finite = true;
  for (int64_t i = threadIdx.x; i < problem.k; i += kStaticThreads)
    finite = finite &&
             (__float_as_uint(read_float(x, problem.type, i)) & kMagnitudeBits) < kInfinityBits;
  finite = __syncthreads_and(finite);

  const float scale = *fixed.scale;
  const int32_t zero_point = fixed.zero_point == nullptr ? 0 : *fixed.zero_point;
  // As floats, before the zero point is added: all of it exact.
  const float low = -128.0f - float(zero_point), high = 127.0f - float(zero_point);
  for (int64_t i = 4 * threadIdx.x; i < problem.q_width; i += 4 * kStaticThreads) {
    uint32_t four = 0;
    for (int64_t j = 0; j < 4 && i + j < problem.k && finite; ++j) {
      // Clamped, then rounded: the bounds are whole numbers, and what is far beyond them could not
      // be rounded by adding kRoundsToInteger.
      const float value = read_float(x, problem.type, i + j) / scale;
      const float clamped = fminf(fmaxf(value, low), high);
      const uint32_t q = __float_as_uint(clamped + kRoundsToInteger) + uint32_t(zero_point);
      four |= (q & 0xffu) << 8 * j;
    }
    store_global<4>(problem.q + m * problem.q_width + i, &four);
  }
  if (threadIdx.x == 0) problem.scale[m] = finite ? scale : __uint_as_float(kMagnitudeBits);
}

}  // namespace

void quantize_rows_cuda(const void* x, FloatType type, int64_t m, int64_t k, int64_t row_bytes,
                        const QuantizedOnDevice& to, cudaStream_t stream) {
  if (m == 0) return;
  const Problem problem = {
      static_cast<const char*>(x), type, m, k, row_bytes, to.q, to.width, to.scale, to.sum};
  switch (type) {
    case FloatType::float32:
      return quantize_rows_of<float>(problem, stream);
    case FloatType::bfloat16:
      return quantize_rows_of<bfloat16>(problem, stream);
    case FloatType::float16:
      return quantize_rows_of<float16>(problem, stream);
  }
}

void quantize_rows_static_cuda(const void* x, FloatType type, int64_t m, int64_t k,
                               int64_t row_bytes, const StaticScaleOnDevice& fixed,
                               const QuantizedOnDevice& to, cudaStream_t stream) {
  if (m == 0) return;
  const Problem problem = {
      static_cast<const char*>(x), type, m, k, row_bytes, to.q, to.width, to.scale, to.sum};
  launch("quantize_rows", quantize_rows_static_kernel, {m, kStaticThreads}, stream, problem, fixed);
}

}  // namespace trine
