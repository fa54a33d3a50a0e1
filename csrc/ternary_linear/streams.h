// Few activation rows: vectors along k. The weight is read as it lies, from kStreams places at
// once.
//
// A vector holds kLanes packed words, so that plane i of it, bits 2i..2i+1 of each byte, is codes
// of k = 16w + 4i + j at byte j of dword w. The activations are brought into that order first, once
// per Tile: blocks of kLanes x 4 dwords, transposed.
//
// The tile's columns are cut into kStreams runs of consecutive ones, and the sums of one column of
// each are taken together. That makes as many sequential streams through memory, which is what the
// processor's prefetcher follows; as many neighbouring rows, one beside the other, it does not
// (measured on Zen 4, 4096 x 4096 from memory: 22 GB/s against 9).
//
// What bounds it, on Zen 4 with a vector of 64 bytes. One row from memory: the memory. Of what a
// loop reaches that only reads the same weights in the same turns, in four streams, the kernel
// reaches 94%, the operator 92% at 4096 x 4096 and 89% at 2560 x 2560: a call, in which nothing is
// read, takes 3 us, and 7 where the weight before has driven its code from the caches. Where a
// weight's pages lie makes 10% of difference to that loop; from some of them eight streams are up
// to 10% faster, but not in the kernel. Both figures are from before the pages were touched ahead,
// which made one row 1.03 to 1.06 times as fast, two rows at 4096 x 4096 1.2 times. On two threads
// the loop is 1.4 times as fast as on one (33 GB/s), the operator in the same runs 1.45 times; from
// the caches 1.8 to 1.9 times.
//
// One row from the caches: the products, of which one starts each cycle. A load, four ANDs and four
// vpdpbusd, so 4 cycles, take 64 packed bytes, 59 GB/s at 3.7 GHz; 49 are measured. From two rows
// on the shifts, three for each vector, are hidden; 92 to 94% of the product's peak is measured at
// 4 to 12 rows. With 32 bytes (AVX2) and one row a load, a shift, 4 ANDs, and a vpmaddubsw and an
// addition for each plane: 14 instructions, of which Zen 3 is measured to take three a cycle, 24
// GB/s (22 with a shift for each plane).
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "common/gemm_blocking.h"
#include "common/pages.h"
#include "ternary_linear/planes.h"
#include "ternary_linear/ternary_linear.h"

namespace trine {
namespace {

inline constexpr int64_t kStreams = 4;
// Helps each stream over the page borders, which stop the processor's own prefetcher. With groups
// it also bridges the time in which they are summed and nothing is read.
inline constexpr int64_t kPrefetchBytes = 1024, kGroupedPrefetchBytes = 3072;

// `to` gets the blocks of row `q`; what lies beyond its `words` words is zero.
template <int64_t kLanes>
void transpose_activations(const int8_t* q, int64_t words, int8_t* to) {
  const int64_t padded = round_up(words, kLanes);
  for (int64_t w = 0; w < padded; ++w)
    for (int64_t i = 0; i < 4; ++i) {
      int8_t* dword = to + (w / kLanes * 4 + i) * kLanes * 4 + w % kLanes * 4;
      if (w < words)
        std::memcpy(dword, q + 16 * w + 4 * i, 4);
      else
        std::memset(dword, 0, 4);
    }
}

// Where the sums of each stream's columns go, and its first weight row.
struct Streams {
  const uint8_t* row[kStreams];
  int32_t* sums[kStreams];
  int32_t* chunk_sums;  // see grouped_streams.h
};

// streams.sums[s][i * sums_stride + j] = the products of activation row i with the codes of weight
// row j of stream s, for `count` rows of each stream. With `chunks`, one activation row's products
// are added up over each 16 packed bytes only: to streams.chunk_sums, a vector for each step along
// k and each j: [step][j][chunk of the step][s].
template <class Simd, int kRows, bool chunks = false>
void sum_streams(const int8_t* q, int64_t q_stride, Streams streams, int64_t stride, int64_t count,
                 int64_t sums_stride) {
  using Words = typename Simd::Words;
  using Sums = typename Simd::Sums;
  using Int32 = typename Simd::Int32;
  constexpr int kPlaneSums = kRows == 1 && !chunks ? Simd::kPlaneSums : 1;  // one leaves registers
  constexpr int64_t kVectorBytes = Simd::kLanes * 4, kPackedBytes = Simd::kPackedBytes;
  constexpr int64_t kAhead = chunks ? kGroupedPrefetchBytes : kPrefetchBytes;
  // A step reads a whole vector, of which another packed form may use less: none beyond the row.
  const int64_t steps = stride < kVectorBytes ? 0 : (stride - kVectorBytes) / kPackedBytes + 1;
  const int64_t bytes_left = stride - steps * kPackedBytes;
  const int64_t touched_rows = std::max<int64_t>(kTouchedBytes / std::max<int64_t>(stride, 1), 1);
  for (int64_t j = 0; j < count; ++j) {
    if (j % touched_rows == 0)  // the next rows' pages, at first these rows', too
      for (const uint8_t* row : streams.row) {
        const int64_t first = j == 0 ? 0 : touched_rows;
        const int64_t last = std::min(2 * touched_rows, count - j);
        touch_pages(row + first * stride, (last - first) * stride);
      }
    Sums acc[kRows * kPlaneSums][kStreams];
    Int32 total[kRows][kStreams];
    unrolled<kRows>([&](auto i) __attribute__((always_inline)) {
      unrolled<kStreams>([&](auto s) __attribute__((always_inline)) { total[i][s] = Int32{}; });
    });
    const auto clear = [&]() __attribute__((always_inline)) {
      unrolled<kRows * kPlaneSums>([&](auto i) __attribute__((always_inline)) {
        unrolled<kStreams>([&](auto s) __attribute__((always_inline)) { acc[i][s] = Sums{}; });
      });
    };
    const auto multiply = [&](const Words(&words)[kStreams],
                              int64_t step) __attribute__((always_inline)) {
      unrolled<4>([&](auto plane) __attribute__((always_inline)) {
        Words x[kRows];
        unrolled<kRows>([&](auto i) __attribute__((always_inline)) {
          x[i] = Simd::load(q + i * q_stride + (4 * step + plane) * kVectorBytes);
        });
        unrolled<kStreams>([&](auto s) __attribute__((always_inline)) {
          const Words codes = codes_of_plane<kPlaneSums>(words[s], plane);
          unrolled<kRows>([&](auto i) __attribute__((always_inline)) {
            Sums& sum = acc[i * kPlaneSums + plane % kPlaneSums][s];
            sum = Simd::dot(sum, codes, x[i]);
          });
        });
      });
    };
    const auto flush = [&]() __attribute__((always_inline)) {
      unrolled<kRows>([&](auto i) __attribute__((always_inline)) {
        unrolled<kStreams>([&](auto s) __attribute__((always_inline)) {
          total[i][s] += add_planes<Simd, kPlaneSums>([&](auto sum) __attribute__((always_inline)) {
            return acc[i * kPlaneSums + sum][s];
          });
        });
      });
    };

    const auto store_chunks = [&](int64_t step) __attribute__((always_inline)) {
      Int32 sum[kStreams];
      unrolled<kStreams>([&](auto s)
                             __attribute__((always_inline)) { sum[s] = Simd::widened(acc[0][s]); });
      Simd::store_chunks(sum, streams.chunk_sums + (step * (Simd::kLanes / 4) + j) * Simd::kLanes);
    };

    clear();
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t at = step * kPackedBytes;
      Words words[kStreams];
      unrolled<kStreams>([&](auto s) __attribute__((always_inline)) {
        if (kPackedBytes > 32 || at % 64 == 0)
          _mm_prefetch(streams.row[s] + at + kAhead, _MM_HINT_T1);
        words[s] = Simd::load_codes(streams.row[s] + at);
      });
      multiply(words, step);
      if constexpr (chunks) {
        store_chunks(step);
        clear();
      } else if constexpr (constexpr int64_t kWords = words_per_sum<Simd, kPlaneSums>(); kWords > 0)
        if ((step + 1) % kWords == 0) {
          flush();
          clear();
        }
    }
    if (bytes_left > 0) {
      Words words[kStreams];
      unrolled<kStreams>([&](auto s) __attribute__((always_inline)) {
        words[s] = Simd::load_first_codes(streams.row[s] + steps * kPackedBytes, bytes_left);
      });
      multiply(words, steps);
      if constexpr (chunks) store_chunks(steps);
    }
    if constexpr (!chunks) {
      flush();
      unrolled<kRows>([&](auto i) __attribute__((always_inline)) {
        alignas(16) int32_t sum[kStreams];
        Simd::sum_lanes(total[i], sum);
        unrolled<kStreams>([&](auto s) { streams.sums[s][i * sums_stride + j] = sum[s]; });
      });
    }
    for (const uint8_t*& row : streams.row) row += stride;
  }
}

// All of `tile`; the weight, a TernaryWeight or one of another packed form, has no groups.
template <class Simd, class Weight>
void linear_by_streams(const QuantizedRows& x, const Weight& weight, const LinearOutput& out,
                       const Tile& tile) {
  const int64_t rows = tile.m_end - tile.m_begin, columns = tile.n_end - tile.n_begin;
  const int64_t words = round_up(weight.k, kTernaryChunk) / kTernaryPerWord;
  const int64_t q_stride = round_up(words, Simd::kLanes) * 16;
  const int64_t sums_stride = round_up(columns, 16);  // finish_rows reads whole vectors
  const Scratch scratch(rows * (q_stride + sums_stride * int64_t(sizeof(int32_t))));
  int8_t* const q = scratch.data<int8_t>();
  int32_t* const sums = reinterpret_cast<int32_t*>(q + rows * q_stride);
  for (int64_t i = 0; i < rows; ++i)
    transpose_activations<Simd::kLanes>(x.q + (tile.m_begin + i) * x.stride, words,
                                        q + i * q_stride);

  // What several passes read again stays in L2; one pass takes all, its streams as long as can be.
  const int64_t block = rows <= Simd::kStreamRows || weight.stride == 0
                            ? columns
                            : std::max(kBlockBytes / 2 / weight.stride, kStreams);
  for (int64_t n = 0; n < columns; n += block) {
    const int64_t n_end = std::min(n + block, columns), run = (n_end - n) / kStreams;
    for_even_pieces(rows, Simd::kStreamRows, 1, [&](int64_t i, int64_t count) {
      const auto sum_columns = [&](int64_t first, int64_t apart, int64_t length) {
        Streams streams;
        for (int64_t s = 0; s < kStreams; ++s) {
          const int64_t column = std::min(first + s * apart, n_end - 1);
          streams.row[s] = weight.packed + (tile.n_begin + column) * weight.stride;
          streams.sums[s] = sums + i * sums_stride + column;
        }
        with_count<Simd::kStreamRows>(count, [&](auto constant) {
          sum_streams<Simd, constant>(q + i * q_stride, q_stride, streams, weight.stride, length,
                                      sums_stride);
        });
      };
      sum_columns(n, run, run);
      // The last columns, one in each stream; beyond the last it is that one again.
      if (n + kStreams * run < n_end) sum_columns(n + kStreams * run, 1, 1);
    });
  }
  finish_rows(x, weight, sums, sums_stride, 1, nullptr, {weight.scale, weight.per_tensor}, out,
              tile);
}

}  // namespace
}  // namespace trine
