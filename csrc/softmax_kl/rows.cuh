// Rows of logits on a GPU: who works on which, their classes in chunks, and sums over them.
#pragma once

#include "common/cuda/convert.cuh"
#include "common/cuda/device.cuh"
#include "common/cuda/finish.cuh"
#include "common/cuda/memory.cuh"
#include "common/cuda/reduce.cuh"
#include "softmax_kl/elements.cuh"

namespace trine {
namespace {

// A row is a block's, or a short one a warp's.
constexpr int kThreads = 256, kWarps = kThreads / kWarpThreads;
constexpr int kMostClassesOfWarp = 2048;  // eight chunks a lane

// What a thread works on at a time: classes that take 16 bytes in 16 bits.
constexpr int kChunk = 8;

// As words: 16-bit values stay packed until they are used. Where a row may be of fp32 (kPrecise)
// there is space for that.
template <bool kPrecise>
struct Words {
  uint32_t word[kPrecise ? kChunk : kChunk / 2];
};

__device__ __forceinline__ int bytes_of(FloatType type) {
  return type == FloatType::float32 ? 4 : 2;
}

template <bool kPrecise>
__device__ __forceinline__ void load_words(Words<kPrecise>& words, const char* row, FloatType type,
                                           int j) {
  const char* from = row + int64_t(j) * bytes_of(type);
  load_global<16>(words.word, from);
  if constexpr (kPrecise)
    if (type == FloatType::float32) load_global<16>(words.word + 4, from + 16);
}

template <bool kPrecise>
__device__ __forceinline__ void widen(const Words<kPrecise>& words, FloatType type,
                                      float (&x)[kChunk]) {
  if constexpr (kPrecise)
    if (type == FloatType::float32) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x[i] = __uint_as_float(words.word[i]);
      return;
    }
  if (type == FloatType::bfloat16) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      x[i] = widen_on_device(bfloat16{uint16_t(words.word[i / 2] >> i % 2 * 16)});
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      x[i] = widen_on_device(float16{uint16_t(words.word[i / 2] >> i % 2 * 16)});
  }
}

__device__ __forceinline__ void store_chunk(char* row, FloatType type, int j,
                                            const float (&x)[kChunk]) {
  uint32_t word[4];
  char* to = row + int64_t(j) * bytes_of(type);
  if (type == FloatType::float32) {
    store_global<16>(to + 16, x + 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = __float_as_uint(x[i]);
  } else if (type == FloatType::bfloat16) {
#pragma unroll
    for (int i = 0; i < kChunk; i += 2) word[i / 2] = narrow_pair_to_bfloat16(x[i], x[i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; i += 2) word[i / 2] = narrow_pair_to_float16(x[i], x[i + 1]);
  }
  store_global<16>(to, word);
}

__device__ __forceinline__ float class_weight(const LabelsOnDevice& hard, int j) {
  return hard.class_weight == nullptr ? 1.0f : hard.class_weight[j];
}

__device__ __forceinline__ bool counts(const SoftmaxKlOnDevice& problem, int64_t row) {
  return problem.row_mask == nullptr || problem.row_mask[row];
}

// The threads that share a row.
struct RowGroup {
  int64_t row;
  int rank, threads;

  __device__ __forceinline__ bool is_warp() const { return threads == kWarpThreads; }
};

__host__ __device__ inline int threads_of_row(int classes) {
  return classes <= kMostClassesOfWarp ? kWarpThreads : kThreads;
}

__device__ __forceinline__ RowGroup group_of(int classes, int64_t block) {
  const int threads = threads_of_row(classes), thread = int(threadIdx.x);
  return {block * (kThreads / threads) + thread / threads, thread % threads, threads};
}

// Classes `begin` to `end` of rows in memory. Chunks go from `body` to `body_end`; before and
// behind, and everywhere if the rows are never aligned together, classes are taken one by one.
struct Span {
  int begin, end, body, body_end;

  template <class... Rows>
  __device__ __forceinline__ Span(int begin, int end, const Rows&... rows)
      : begin(begin), end(end), body(begin) {
    while (body < begin + kChunk && ((rows.misalignment(body) | ...) != 0)) ++body;
    if (body == begin + kChunk || body > end) body = end;
    body_end = body + (end - body) / kChunk * kChunk;
  }

  // Calls visit(j) for each class j that is in no chunk.
  template <class Visit>
  __device__ __forceinline__ void for_single(const RowGroup& group, const Visit& visit) const {
    const int before = body - begin, count = before + end - body_end;
#pragma unroll 1
    for (int i = group.rank; i < count; i += group.threads)
      visit(i < before ? begin + i : body_end + i - before);
  }

  // Calls load(words, j) for kBatch chunks, then visit(words, j) for each.
  template <int kBatch, class Held, class Load, class Visit>
  __device__ __forceinline__ void for_chunks(const RowGroup& group, const Load& load,
                                             const Visit& visit) const {
    const int step = kChunk * group.threads;
#pragma unroll 1
    for (int64_t j = body + kChunk * group.rank; j < body_end; j += kBatch * step) {
      Held held[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (j + i * step < body_end) load(held[i], int(j + i * step));
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (j + i * step < body_end) visit(held[i], int(j + i * step));
    }
  }
};

// A row of logits in memory.
struct LogitsRow {
  char* data;
  FloatType type;

  __device__ __forceinline__ LogitsRow(const LogitsOnDevice& logits, int64_t row)
      : data(const_cast<char*>(logits.data) + row * logits.row_bytes), type(logits.type) {}
  __device__ __forceinline__ LogitsRow(void* data, FloatType type, int64_t first)
      : data(static_cast<char*>(data) + first * bytes_of(type)), type(type) {}

  __device__ __forceinline__ uint32_t misalignment(int j) const {
    return (uint32_t(reinterpret_cast<uintptr_t>(data)) + uint32_t(j * bytes_of(type))) % 16;
  }
  __device__ __forceinline__ float at(int j) const { return read_float(data, type, j); }
  __device__ __forceinline__ void store(int j, const float (&x)[1]) const {
    write_float(data, type, j, x[0]);
  }
  __device__ __forceinline__ void store(int j, const float (&x)[kChunk]) const {
    store_chunk(data, type, j, x);
  }
};

// Chunks of both rows that a thread has on their way at a time: 64 bytes of a plain KL. The kernels
// for everything else are long, and short of registers.
template <bool kGeneral, bool kPrecise>
constexpr int kBatch = kGeneral || kPrecise ? 1 : 2;

// From logits to what rates and origins speak of.
template <bool kGeneral, int kCount>
__device__ __forceinline__ void see(const LogitsOnDevice& side, float (&x)[kCount]) {
  if constexpr (kGeneral)
    if (side.slope != 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = tanh_of(x[i] * side.slope);
    }
}

// Blocks that an SM holds. A plain KL's have 80 registers a thread, and 48 KB on their way.
template <bool kGeneral, bool kPrecise>
constexpr int kBlocks = kGeneral || kPrecise ? 2 : 3;

template <bool kPrecise>
struct PairOfWords {
  Words<kPrecise> first, second;
};

// The two rows of logits, as they are seen.
template <bool kGeneral, bool kPrecise>
struct Rows {
  const SoftmaxKlOnDevice& problem;
  const LogitsRow first, second;

  __device__ __forceinline__ Rows(const SoftmaxKlOnDevice& problem, int64_t row)
      : problem(problem), first(problem.first, row), second(problem.second, row) {}

  __device__ __forceinline__ float student_at(int j) const {
    float z[1] = {(problem.reversed ? second : first).at(j)};
    see<kGeneral>(problem.reversed ? problem.second : problem.first, z);
    return z[0];
  }

  // Calls visit(a, b, j) for all classes of `span`: logits of classes j and following.
  template <class Visit>
  __device__ __forceinline__ void visit(const Span& span, const RowGroup& group,
                                        const Visit& visit) const {
    using Held = PairOfWords<kPrecise>;
    span.for_chunks<kBatch<kGeneral, kPrecise>, Held>(
        group,
        [&](Held& words, int j) {
          load_words(words.first, first.data, first.type, j);
          load_words(words.second, second.data, second.type, j);
        },
        [&](const Held& words, int j) { show(words, j, visit); });
    visit_single(span, group, visit);
  }

  // Calls visit(a, b, j) with the logits of a chunk.
  template <class Visit>
  __device__ __forceinline__ void show(const PairOfWords<kPrecise>& words, int j,
                                       const Visit& visit) const {
    float a[kChunk], b[kChunk];
    widen(words.first, first.type, a);
    widen(words.second, second.type, b);
    see<kGeneral>(problem.first, a);
    see<kGeneral>(problem.second, b);
    visit(a, b, j);
  }

  // The classes that are in no chunk.
  template <class Visit>
  __device__ __forceinline__ void visit_single(const Span& span, const RowGroup& group,
                                               const Visit& visit) const {
    span.for_single(group, [&](int j) {
      float a[1] = {first.at(j)}, b[1] = {second.at(j)};
      see<kGeneral>(problem.first, a);
      see<kGeneral>(problem.second, b);
      visit(a, b, j);
    });
  }
};

}  // namespace
}  // namespace trine
