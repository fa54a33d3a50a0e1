// quantize_rows for every GPU from sm_80 on: memory-bound, so each value is read once (as 16-byte
// accesses where the alignment allows) and kept in registers between the two steps, the row's
// largest magnitude and the quantisation by it.
#include "quantize_rows/cuda.h"

#include "common/cuda/convert.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/reduce.cuh"
#include "quantize_rows/quantize_rows.h"

namespace trine {
namespace {

// What a thread reads at a time: the widest access there is.
constexpr int kChunkBytes = 16;

template <class T>
constexpr int kChunkValues = kChunkBytes / int(sizeof(T));

template <class T>
struct alignas(kChunkBytes) Chunk {
  T value[kChunkValues<T>];
};

template <class T>
struct alignas(8) QuantizedChunk {
  uint32_t word[kChunkValues<T> / 4];  // four q in each
};

// Chunks of a row that a thread keeps in registers. Four make a kernel of at most 64 registers, so
// that an SM holds at least 1024 threads, with 64 KB of loads in flight: more than memory latency
// times the bandwidth of one SM (some 25 KB on H200).
constexpr int kHeldChunks = 4;

struct Problem {
  const char* x;
  int64_t m, k, row_bytes;
  int8_t* q;
  float* scale;
  int32_t* sum;
  int x_access, q_access;  // the widest access, in bytes, that suits the alignment of every row
};

// One access of kBytes after the other. Template and run-time width are the same number: a switch
// picks the instance.
template <int kBytes, int kTotal>
__device__ __forceinline__ void load_by(void* registers, const char* global) {
#pragma unroll
  for (int at = 0; at < kTotal; at += kBytes)
    load_global<kBytes>(static_cast<char*>(registers) + at, global + at);
}

template <int kBytes, int kTotal>
__device__ __forceinline__ void store_by(char* global, const void* registers) {
#pragma unroll
  for (int at = 0; at < kTotal; at += kBytes)
    store_global<kBytes>(global + at, static_cast<const char*>(registers) + at);
}

// Chunk `c` of the row at `row`; zero behind the row's end.
template <class T>
__device__ __forceinline__ Chunk<T> load_chunk(const Problem& problem, const char* row, int64_t c) {
  Chunk<T> chunk = {};
  const int64_t begin = c * kChunkValues<T>;
  const char* from = row + c * kChunkBytes;
  if (begin + kChunkValues<T> <= problem.k) {
    switch (problem.x_access) {
      case 16:
        load_by<16, kChunkBytes>(&chunk, from);
        break;
      case 8:
        load_by<8, kChunkBytes>(&chunk, from);
        break;
      case 4:
        load_by<4, kChunkBytes>(&chunk, from);
        break;
      default:
        load_by<int(sizeof(T)), kChunkBytes>(&chunk, from);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunkValues<T>; ++i)
      if (begin + i < problem.k)
        load_global<int(sizeof(T))>(&chunk.value[i], from + i * int(sizeof(T)));
  }
  return chunk;
}

template <class T>
__device__ __forceinline__ void store_chunk(const Problem& problem, int8_t* row, int64_t c,
                                            const QuantizedChunk<T>& chunk) {
  const int64_t begin = c * kChunkValues<T>;
  char* to = reinterpret_cast<char*>(row + begin);
  if (begin + kChunkValues<T> <= problem.k) {
    switch (problem.q_access) {
      case 8:
        store_by<sizeof(T) == 2 ? 8 : 4, kChunkValues<T>>(to, &chunk);
        break;
      case 4:
        store_by<4, kChunkValues<T>>(to, &chunk);
        break;
      default:
        store_by<1, kChunkValues<T>>(to, &chunk);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunkValues<T>; ++i)
      if (begin + i < problem.k) store_global<1>(to + i, reinterpret_cast<const char*>(&chunk) + i);
  }
}

// Without their sign the bits of floats order as integers do, with infinity above every number and
// NaN above infinity: one maximum finds the largest magnitude and whether all of them are finite.
constexpr uint32_t kMagnitudeBits = 0x7fffffffu;
constexpr uint32_t kInfinityBits = 0x7f800000u;

template <class T>
__device__ __forceinline__ uint32_t largest_magnitude(const Chunk<T>& chunk, uint32_t largest) {
#pragma unroll
  for (int i = 0; i < kChunkValues<T>; ++i)
    largest = Maximum{}(largest, __float_as_uint(widen_on_device(chunk.value[i])) & kMagnitudeBits);
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
    for (int j = 0; j < 4; ++j)
      byte[j] = quantize_to_low_byte(widen_on_device(chunk.value[i + j]), to_q);
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
template <class T, int kRowThreads, int kBlockThreads>
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
  int8_t* q = problem.q + m * problem.k;
  const int64_t first_not_held = thread + kHeldChunks * kRowThreads;

  Chunk<T> held[kHeldChunks] = {};
#pragma unroll
  for (int i = 0; i < kHeldChunks; ++i) {
    const int64_t c = thread + i * kRowThreads;
    if (c < chunks) held[i] = load_chunk<T>(problem, x, c);
  }
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kHeldChunks; ++i) largest = largest_magnitude(held[i], largest);
  for (int64_t c = first_not_held; c < chunks; c += kRowThreads)
    largest = largest_magnitude(load_chunk<T>(problem, x, c), largest);
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
    if (c < chunks) store_chunk<T>(problem, q, c, quantize_chunk(held[i], to_q, keep, total));
  }
  for (int64_t c = first_not_held; c < chunks; c += kRowThreads)
    store_chunk<T>(problem, q, c, quantize_chunk(load_chunk<T>(problem, x, c), to_q, keep, total));
  total = reduce_threads<kRowThreads>(total, Sum{}, warp_total);

  if (has_row && thread == 0) {
    problem.scale[m] = zero ? 0.0f : finite ? absmax / 127.0f : __uint_as_float(kMagnitudeBits);
    problem.sum[m] = total;
  }
}

// The widest power of two up to `widest` that divides every given number.
template <class... Numbers>
int common_alignment(int widest, Numbers... numbers) {
  int alignment = widest;
  while (((uint64_t(numbers) % alignment != 0) || ...)) alignment /= 2;
  return alignment;
}

template <class T>
void quantize_rows(const Problem& problem, cudaStream_t stream) {
  const int64_t chunks = (problem.k + kChunkValues<T> - 1) / kChunkValues<T>;
  const auto run = [&]<int kRowThreads, int kBlockThreads>() {
    constexpr int kRowsPerBlock = kBlockThreads / kRowThreads;
    launch("quantize_rows", quantize_rows_kernel<T, kRowThreads, kBlockThreads>,
           (problem.m + kRowsPerBlock - 1) / kRowsPerBlock, kBlockThreads, stream, problem);
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

}  // namespace

void quantize_rows_cuda(const void* x, FloatType type, int64_t m, int64_t k, int64_t row_bytes,
                        int8_t* q, float* scale, int32_t* sum, cudaStream_t stream) {
  if (m == 0) return;
  const Problem problem = {
      static_cast<const char*>(x),
      m,
      k,
      row_bytes,
      q,
      scale,
      sum,
      common_alignment(16, reinterpret_cast<uintptr_t>(x), row_bytes),
      common_alignment(8, reinterpret_cast<uintptr_t>(q), k),
  };
  switch (type) {
    case FloatType::float32:
      return quantize_rows<float>(problem, stream);
    case FloatType::bfloat16:
      return quantize_rows<bfloat16>(problem, stream);
    case FloatType::float16:
      return quantize_rows<float16>(problem, stream);
  }
}

}  // namespace trine
