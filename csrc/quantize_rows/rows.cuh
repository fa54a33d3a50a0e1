// What the kernels that quantise rows on a GPU share: a row's values in registers, read once in
// chunks of 16 bytes, and the quantisation of what is held.
#pragma once

#include "common/cuda/convert.cuh"
#include "common/cuda/device.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/reduce.cuh"
#include "common/float_types.h"
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

struct RowsToQuantize {
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

// Of a row with this largest magnitude (its bits). `keep`: all ones, or 0 to make every q 0.
struct RowScaling {
  float to_q, scale;
  uint32_t keep;
};

__device__ __forceinline__ RowScaling row_scaling(uint32_t largest) {
  const float absmax = __uint_as_float(largest);
  const bool finite = largest < kInfinityBits, zero = absmax < kSmallestAbsmax;
  const float scale = zero ? 0.0f : finite ? absmax / 127.0f : __uint_as_float(kMagnitudeBits);
  return {127.0f / absmax, scale, finite && !zero ? ~0u : 0u};
}

// With a scale and zero point from outside, in the low byte.
__device__ __forceinline__ uint32_t quantize_static_to_low_byte(float x, float scale,
                                                                int32_t zero_point) {
  // As floats, before the zero point is added: all of it exact.
  const float low = -128.0f - float(zero_point), high = 127.0f - float(zero_point);
  // Clamped, then rounded: the bounds are whole numbers, and what is far beyond them could not be
  // rounded by adding kRoundsToInteger.
  const float clamped = fminf(fmaxf(x / scale, low), high);
  return __float_as_uint(clamped + kRoundsToInteger) + uint32_t(zero_point);
}

// Nothing to clamp: |x * (127 / absmax)| <= 127 * (1 + 2^-24)^2, which rounds to 127 at most.
__device__ __forceinline__ uint32_t quantize_to_low_byte(float x, float to_q) {
  return __float_as_uint(x * to_q + kRoundsToInteger);
}

// The q of a chunk, and their sum added to `total`.
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

// The part of a thread: kRowThreads consecutive threads of a block work on a row. A row has no more
// chunks than they hold, except where kRowThreads is the most: what is beyond is then read again
// (from the L2 cache).
template <class T, bool kWide, int kRowThreads, int kBlockThreads, int kMostRowThreads>
struct RowShare {
  static constexpr bool kMayBeLonger = kRowThreads == kMostRowThreads;
  static constexpr int kRowWarps = (kRowThreads + kWarpThreads - 1) / kWarpThreads;

  const RowsToQuantize& problem;
  const int thread = threadIdx.x % kRowThreads;
  const int64_t m = int64_t(blockIdx.x) * (kBlockThreads / kRowThreads) + threadIdx.x / kRowThreads;
  // Threads behind the last row have no chunks, but take part in the reductions.
  const bool has_row = m < problem.m;
  const int64_t chunks = has_row ? (problem.k + kChunkValues<T> - 1) / kChunkValues<T> : 0;
  const char* const x = problem.x + m * problem.row_bytes;
  const int64_t first_not_held = thread + kHeldChunks * kRowThreads;

  __device__ __forceinline__ Chunk<T> load(int64_t c) const {
    return load_chunk<T, kWide>(x, problem.k, c);
  }

  // Calls visit(i, c) for each chunk c that this thread has, held in place i.
  template <class Visit>
  __device__ __forceinline__ void for_held(const Visit& visit) const {
#pragma unroll
    for (int i = 0; i < kHeldChunks; ++i) {
      const int64_t c = thread + i * kRowThreads;
      if (c < chunks) visit(i, c);
    }
  }

  // Calls visit(c) for each chunk c that this thread has and does not hold.
  template <class Visit>
  __device__ __forceinline__ void for_not_held(const Visit& visit) const {
    if constexpr (kMayBeLonger)
#pragma unroll 1
      for (int64_t c = first_not_held; c < chunks; c += kRowThreads) visit(c);
  }

  // Quantises the row; load(c) gives its chunks that are not held.
  template <class Load>
  __device__ __forceinline__ void quantize(const Chunk<T> (&held)[kHeldChunks],
                                           const Load& load) const {
    TRINE_SHARED_ARRAY(uint32_t, warp_largest, kRowWarps);
    TRINE_SHARED_ARRAY(int32_t, warp_total, kRowWarps);
    int8_t* const q = problem.q + m * problem.q_width;

    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kHeldChunks; ++i) largest = largest_magnitude(held[i], largest);
    for_not_held([&](int64_t c) { largest = largest_magnitude(load(c), largest); });
    largest = reduce_threads<kRowThreads>(largest, Maximum{}, warp_largest);

    const RowScaling row = row_scaling(largest);
    int32_t total = 0;
    const auto quantize_one = [&](const Chunk<T>& chunk, int64_t c) {
      store_chunk<T, kWide>(q, problem.k, c, quantize_chunk(chunk, row.to_q, row.keep, total));
    };
    for_held([&](int i, int64_t c) { quantize_one(held[i], c); });
    for_not_held([&](int64_t c) { quantize_one(load(c), c); });
    total = reduce_threads<kRowThreads>(total, Sum{}, warp_total);

    const uint32_t padding = 0;
    for (int64_t i = problem.k + thread; has_row && i < problem.q_width; i += kRowThreads)
      store_global<1>(q + i, &padding);
    if (has_row && thread == 0) {
      problem.scale[m] = row.scale;
      problem.sum[m] = total;
    }
  }
};

// Calls run<kRowThreads, kBlockThreads>() for rows of this length, with the number of blocks.
template <class T, int kMostRowThreads, class Run>
void with_row_threads(const RowsToQuantize& problem, const Run& run) {
  const int64_t chunks = (problem.k + kChunkValues<T> - 1) / kChunkValues<T>;
  const auto go = [&]<int kRowThreads, int kBlockThreads>() {
    constexpr int kRowsPerBlock = kBlockThreads / kRowThreads;
    run.template operator()<kRowThreads, kBlockThreads>((problem.m + kRowsPerBlock - 1) /
                                                        kRowsPerBlock);
  };
  // The fewest threads that hold the row, each step four times the last. Eight are the least that
  // read whole 128-byte lines; a block has 128 threads or more, so that 16 blocks fill an SM.
  if (chunks <= 8 * kHeldChunks)
    go.template operator()<8, 128>();
  else if (chunks <= 32 * kHeldChunks)
    go.template operator()<32, 128>();
  else if (chunks <= 128 * kHeldChunks)
    go.template operator()<128, 128>();
  else if (kMostRowThreads == 512 || chunks <= 512 * kHeldChunks)
    go.template operator()<512, 512>();
  else if constexpr (kMostRowThreads > 512)
    go.template operator()<1024, 1024>();
}

// Rows of whole chunks, each of them aligned in x and in q: torch's own memory is aligned to more,
// so this asks for a K that is a multiple of 8 (4 in float32) and a row stride that is one.
template <class T>
bool chunks_are_aligned(const RowsToQuantize& problem) {
  return problem.k % kChunkValues<T> == 0 && problem.q_width % kChunkValues<T> == 0 &&
         problem.row_bytes % kChunkBytes == 0 &&
         reinterpret_cast<uintptr_t>(problem.x) % kChunkBytes == 0 &&
         reinterpret_cast<uintptr_t>(problem.q) % kChunkValues<T> == 0;
}

// Calls run(T{}) for the type of x.
template <class Run>
void with_type_of_x(const RowsToQuantize& problem, const Run& run) {
  switch (problem.type) {
    case FloatType::float32:
      return run(float{});
    case FloatType::bfloat16:
      return run(bfloat16{});
    case FloatType::float16:
      return run(float16{});
  }
}

}  // namespace
}  // namespace trine
