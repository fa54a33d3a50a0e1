// Rows of logits that stay on the chip while they are needed twice: in shared memory, to which they
// are copied asynchronously. A thread reads what it copied itself, so that it waits for nobody.
#pragma once

#include "common/cuda/async_copy.cuh"
#include "softmax_kl/rows.cuh"

namespace trine {
namespace {

// Chunks of both rows that a thread has on their way: 64 KB of a block in 16 bits.
constexpr int kAhead = 8;

// What `classes` classes of as many threads take of a block's shared memory.
template <bool kPrecise>
int bytes_of_parked(int classes, int threads) {
  const int slots = ((classes + kChunk - 1) / kChunk + threads - 1) / threads;
  return (slots > 0 ? slots : 1) * kThreads * int(sizeof(PairOfWords<kPrecise>));
}

template <bool kGeneral, bool kPrecise>
class ParkedRows {
 public:
  // Starts the first copies.
  __device__ __forceinline__ ParkedRows(const Rows<kGeneral, kPrecise>& rows, const Span& span,
                                        const RowGroup& group, unsigned char* memory)
      : rows_(rows), span_(span), group_(group), own_(memory + threadIdx.x * kUnit) {
#pragma unroll 1
    for (int slot = 0; slot < kAhead; ++slot) copy(slot);
  }

  // Calls visit(a, b, j) for all classes of the span, in the order of their arrival.
  template <class Visit>
  __device__ __forceinline__ void visit_arriving(const Visit& visit) const {
#pragma unroll 1
    for (int slot = 0; class_of(slot) < span_.body_end; ++slot) {
      copy_async_wait<kAhead - 1>();
      rows_.show(words(slot), class_of(slot), visit);
      copy(slot + kAhead);
    }
    rows_.visit_single(span_, group_, visit);
  }

  // Again.
  template <class Visit>
  __device__ __forceinline__ void visit(const Visit& visit) const {
#pragma unroll 1
    for (int slot = 0; class_of(slot) < span_.body_end; ++slot)
      rows_.show(words(slot), class_of(slot), visit);
    rows_.visit_single(span_, group_, visit);
  }

 private:
  // A chunk of both rows is so many units of 16 bytes; a unit of all threads lies together, so that
  // a warp's accesses meet all banks.
  static constexpr int kUnit = 16, kUnits = int(sizeof(PairOfWords<kPrecise>)) / kUnit;

  const Rows<kGeneral, kPrecise>& rows_;
  const Span& span_;
  const RowGroup& group_;
  unsigned char* const own_;

  __device__ __forceinline__ int class_of(int slot) const {
    return span_.body + (slot * group_.threads + group_.rank) * kChunk;
  }
  __device__ __forceinline__ unsigned char* place(int slot, int unit) const {
    return own_ + (slot * kUnits + unit) * kThreads * kUnit;
  }

  // One group of copies, perhaps of nothing.
  __device__ __forceinline__ void copy(int slot) const {
    const int j = class_of(slot);
    if (j < span_.body_end) {
      copy_row(rows_.first, j, slot, 0);
      copy_row(rows_.second, j, slot, kUnits / 2);
    }
    copy_async_commit();
  }
  __device__ __forceinline__ void copy_row(const LogitsRow& row, int j, int slot, int unit) const {
    const char* from = row.data + int64_t(j) * bytes_of(row.type);
    copy_async(shared_address(place(slot, unit)), from, true);
    if constexpr (kPrecise)
      if (row.type == FloatType::float32)
        copy_async(shared_address(place(slot, unit + 1)), from + kUnit, true);
  }

  __device__ __forceinline__ PairOfWords<kPrecise> words(int slot) const {
    PairOfWords<kPrecise> held;
    load_row(held.first, slot, 0);
    load_row(held.second, slot, kUnits / 2);
    return held;
  }
  __device__ __forceinline__ void load_row(Words<kPrecise>& words, int slot, int unit) const {
#pragma unroll
    for (int i = 0; i < kUnits / 2; ++i) {
      const uint4 value = *reinterpret_cast<const uint4*>(place(slot, unit + i));
      words.word[4 * i] = value.x;
      words.word[4 * i + 1] = value.y;
      words.word[4 * i + 2] = value.z;
      words.word[4 * i + 3] = value.w;
    }
  }
};

}  // namespace
}  // namespace trine
