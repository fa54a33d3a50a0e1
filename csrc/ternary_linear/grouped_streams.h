// Few activation rows, and groups: the weight is read in streams, as in streams.h.
//
// A group is whole chunks of 16 packed bytes, so the products of a vector are added up over each
// chunk of it, for a column of each stream at once: a vector of chunk sums. kLanes / 4 columns of
// each stream later these are transposed into one vector across kLanes columns for every chunk, and
// what remains is as in lanes.h: a few instructions for each group and kLanes columns, once the
// scales have been transposed, too.
//
// What bounds it, on Zen 4 with one row: from memory the memory, but for the time in which groups
// are summed. Of what a loop that only reads reaches, 76, 83 and 84% at 4096 x 4096 with groups of
// 64, 128 and 256, scales counted (93% without groups). From the caches the instructions: for 64
// packed bytes a load, three shifts, four ANDs, four vpdpbusd and three for the sums of chunks, 9
// cycles; groups of 64 take 1.5 more.
#pragma once

#include <algorithm>

#include "ternary_linear/groups.h"
#include "ternary_linear/streams.h"

namespace trine {
namespace {

// to[g * kLanes + 4 * j + s] = the scale of group g of row j of stream s. Rows from `count` on
// repeat the last.
template <class Simd>
void transpose_scales(const float* const (&row)[kStreams], int64_t groups, int64_t count,
                      float* to) {
  for (int64_t g = 0; g < groups; g += Simd::kLanes) {
    const int64_t left = std::min(groups - g, Simd::kLanes);
    typename Simd::Words lines[Simd::kLanes];
    unrolled<Simd::kLanes>([&](auto lane) __attribute__((always_inline)) {
      const float* at =
          row[lane % kStreams] + std::min<int64_t>(lane / kStreams, count - 1) * groups;
      lines[lane] = left == Simd::kLanes ? Simd::load(at + g) : Simd::load_first(at + g, left);
    });
    Simd::transpose(lines);
    unrolled<Simd::kLanes>([&](auto i) __attribute__((always_inline)) {
      Simd::store(lines[i], to + (g + i) * Simd::kLanes);
    });
  }
}

// The sum over all groups of float(acc_g) * weight_scale, for kLanes columns.
template <class Simd>
typename Simd::Floats sum_of_groups(const int32_t* chunk_sums, int64_t chunks,
                                    int64_t chunks_in_group, const int32_t* minus,
                                    const float* scale) {
  using Int32 = typename Simd::Int32;
  using Floats = typename Simd::Floats;
  constexpr int64_t kTogether = Simd::kLanes / kStreams;
  Floats total = {};
  Int32 acc = {};
  int64_t left = chunks_in_group;
  for (int64_t chunk = 0; chunk < chunks; chunk += kTogether) {
    typename Simd::Words sums[kTogether];
    unrolled<kTogether>([&](auto j) __attribute__((always_inline)) {
      sums[j] = Simd::load(chunk_sums + (chunk + j) * Simd::kLanes);
    });
    Simd::transpose_quarters(sums);
    unrolled<kTogether>([&](auto c) __attribute__((always_inline)) {
      acc += (Int32)sums[c];
      if (--left > 0 || chunk + c >= chunks) return;
      total +=
          __builtin_convertvector(acc - *minus++, Floats) * *reinterpret_cast<const Floats*>(scale);
      scale += Simd::kLanes;
      acc = Int32{};
      left = chunks_in_group;
    });
  }
  return total;
}

// All of `tile`; the weight has groups.
template <class Simd>
void grouped_by_streams(const QuantizedRows& x, const TernaryWeight& weight,
                        const LinearOutput& out, const Tile& tile) {
  constexpr int64_t kTogether = Simd::kLanes / kStreams;  // columns of each stream
  const int64_t rows = tile.m_end - tile.m_begin, columns = tile.n_end - tile.n_begin;
  const int64_t words = weight.stride / 4, q_stride = round_up(words, Simd::kLanes) * 16;
  const int64_t groups = weight.k / weight.group_size;
  const int64_t chunks_size = round_up(words / 4, kTogether) * Simd::kLanes;
  const int64_t scale_size = round_up(groups, Simd::kLanes) * Simd::kLanes;
  const int64_t columns_size = round_up(columns, 16);
  const Scratch activations(rows * (q_stride + groups * int64_t(sizeof(int32_t))));
  int8_t* const q = activations.data<int8_t>();
  int32_t* const minus = reinterpret_cast<int32_t*>(q + rows * q_stride);
  const Scratch block((chunks_size + scale_size + rows * columns_size) * int64_t(sizeof(int32_t)));
  int32_t* const chunk_sums = block.data<int32_t>();
  float* const scale = reinterpret_cast<float*>(chunk_sums + chunks_size);
  float* const totals = scale + scale_size;

  for (int64_t i = 0; i < rows; ++i)
    transpose_activations<Simd::kLanes>(x.q + (tile.m_begin + i) * x.stride, words,
                                        q + i * q_stride);
  sum_groups(x, weight.group_size, groups, tile, minus);
  std::fill_n(chunk_sums, chunks_size, 0);  // of columns that do not exist

  // `count` columns from each of kStreams places, `apart` from each other; the last one again where
  // there are no more.
  const auto sum_columns = [&](int64_t first, int64_t apart, int64_t count) {
    Streams streams;
    const float* scale_row[kStreams];
    int64_t column[kStreams];
    for (int64_t s = 0; s < kStreams; ++s) {
      column[s] = std::min(first + s * apart, columns - 1);
      streams.row[s] = weight.packed + (tile.n_begin + column[s]) * weight.stride;
      scale_row[s] = weight.scale + (tile.n_begin + column[s]) * groups;
    }
    streams.chunk_sums = chunk_sums;
    transpose_scales<Simd>(scale_row, groups, count, scale);
    for (const float* next : scale_row)
      for (int64_t g = 0; g < kTogether * groups; g += 16)
        _mm_prefetch(next + kTogether * groups + g, _MM_HINT_T1);
    for (int64_t i = 0; i < rows; ++i) {
      sum_streams<Simd, 1, true>(q + i * q_stride, q_stride, streams, weight.stride, count, 0);
      const auto total = sum_of_groups<Simd>(
          chunk_sums, words / 4, weight.group_size / kTernaryChunk, minus + i * groups, scale);
      for (int64_t lane = 0; lane < count * kStreams; ++lane)
        totals[i * columns_size + column[lane % kStreams] + lane / kStreams] = total[lane];
    }
  };
  const int64_t run = columns / kStreams;
  for (int64_t n = 0; n < run; n += kTogether) sum_columns(n, run, std::min(kTogether, run - n));
  if (kStreams * run < columns) sum_columns(kStreams * run, 1, 1);
  for (int64_t i = 0; i < rows; ++i)
    finish_groups(totals + i * columns_size, x.scale[tile.m_begin + i], out, tile.m_begin + i,
                  tile.n_begin, columns);
}

}  // namespace
}  // namespace trine
