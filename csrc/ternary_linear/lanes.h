// Many activation rows: vectors across weight rows.
//
// A block of two times kLanes weight rows is transposed, kPanelWords at a time, so that a vector
// holds one packed word, 16 consecutive k, of each of kLanes rows. Plane i of it, bits 2i..2i+1 of
// each byte, is four consecutive codes of each, which meet the same four values of an activation
// row, broadcast. So every lane is a sum of its own: nothing is added up at the end of a row or of
// a group, and scaling the sums of a group takes three instructions for kLanes of them.
//
//   for a block of weight rows
//     for a panel of k: transpose it
//       for a tile of activation rows: multiply_tile   -> sums (int32), or totals of groups (float)
//     finish: sums or totals -> y
//
// What bounds it: with many rows, the products. On Zen 4 with AVX-512, whose shifts and ANDs, seven
// for each vector of words, start beside them: 90 to 94% of the peak at 32 rows and more, with
// groups of 64, 128 and 256 78, 83 and 88%. A processor with two ports for all of it can reach 82%.
// With AVX2 a word of 4 x 16 sums takes 78 instructions, 20 cycles on four ports; 25 are measured.
// With few rows, the transposition, two shuffles for each 32 packed bytes; and memory, which
// arrives at half of its speed where prefetches alone ask for it.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "common/gemm_blocking.h"
#include "ternary_linear/groups.h"
#include "ternary_linear/planes.h"

namespace trine {
namespace {

// A panel of 32 rows is then 32 KiB of packed words.
inline constexpr int64_t kPanelWords = 4096 / kTernaryPerWord;

// to[j * to_stride + i] = word j of row i, for kLanes rows of `words` words. Rows beyond the last,
// `rows` - 1, repeat it; words up to the next multiple of kLanes are undefined.
template <class Simd>
void transpose_words(const void* from, int64_t stride, int64_t rows, int64_t words, uint32_t* to,
                     int64_t to_stride) {
  const auto* bytes = static_cast<const uint8_t*>(from);
  for (int64_t w = 0; w < words; w += Simd::kLanes) {
    typename Simd::Words lines[Simd::kLanes];
    const auto fill = [&](const auto& load) __attribute__((always_inline)) {
      unrolled<Simd::kLanes>([&](auto i) __attribute__((always_inline)) {
        lines[i] = load(bytes + std::min<int64_t>(i, rows - 1) * stride + w * 4);
      });
    };
    if (words - w >= Simd::kLanes)
      fill([](const uint8_t* at) { return Simd::load(at); });
    else
      fill([&](const uint8_t* at) { return Simd::load_first(at, words - w); });
    Simd::transpose(lines);
    unrolled<Simd::kLanes>([&](auto j) __attribute__((always_inline)) {
      Simd::store(lines[j], to + (w + j) * to_stride);
    });
  }
}

// What a tile of activation rows adds its products to.
struct Units {
  int64_t count, words;  // `count` units of `words` packed words, each scaled by itself
  const int32_t* minus;  // [row][unit]: the sum of the activations, taken from every product
  int64_t minus_stride;
  const float* weight_scale;  // [unit][kVectors * kLanes]
};

// Adds to sums[i][0..kVectors * kLanes) the products of activation row i with the codes of a panel.
// With groups, `sums` are float totals, to which each unit adds its scaled sum.
template <class Simd, int kRows, int kVectors, bool groups>
void multiply_tile(const uint32_t* panel, const uint8_t* ahead, const int8_t* q, int64_t q_stride,
                   const Units& units, int32_t* sums) {
  constexpr int64_t kColumns = kVectors * Simd::kLanes;
  constexpr int kPlaneSums = kRows == 1 ? Simd::kPlaneSums : 1;  // one row leaves registers
  for (int64_t unit = 0; unit < units.count; ++unit) {
    typename Simd::Sums acc[kRows * kPlaneSums][kVectors];
    typename Simd::Int32 total[kRows][kVectors];
    unrolled<kRows>([&](auto i) __attribute__((always_inline)) {
      unrolled<kVectors>(
          [&](auto v) __attribute__((always_inline)) { total[i][v] = typename Simd::Int32{}; });
    });
    const auto clear = [&]() __attribute__((always_inline)) {
      unrolled<kRows * kPlaneSums>([&](auto i) __attribute__((always_inline)) {
        unrolled<kVectors>(
            [&](auto v) __attribute__((always_inline)) { acc[i][v] = typename Simd::Sums{}; });
      });
    };
    const auto flush = [&]() __attribute__((always_inline)) {
      unrolled<kRows>([&](auto i) __attribute__((always_inline)) {
        unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
          total[i][v] += add_planes<Simd, kPlaneSums>([&](auto sum) __attribute__((always_inline)) {
            return acc[i * kPlaneSums + sum][v];
          });
        });
      });
    };
    clear();
    for (int64_t word = 0; word < units.words; ++word) {
      for (int64_t line = 0; line < kColumns * 4; line += 64)
        _mm_prefetch(ahead + line, _MM_HINT_T1);
      ahead += kColumns * 4;
      typename Simd::Words words[kVectors];
      unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
        words[v] = Simd::load(panel + v * Simd::kLanes);
      });
      panel += kColumns;
      unrolled<4>([&](auto plane) __attribute__((always_inline)) {
        typename Simd::Words codes[kVectors];
        unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
          codes[v] = codes_of_plane<kPlaneSums>(words[v], plane);
        });
        unrolled<kRows>([&](auto i) __attribute__((always_inline)) {
          const auto x = Simd::broadcast(q + i * q_stride + 4 * plane);
          unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
            auto& sum = acc[i * kPlaneSums + plane % kPlaneSums][v];
            sum = Simd::dot(sum, codes[v], x);
          });
        });
      });
      q += kTernaryPerWord;
      if constexpr (constexpr int64_t kWords = words_per_sum<Simd, kPlaneSums>(); kWords > 0)
        if ((word + 1) % kWords == 0) {
          flush();
          clear();
        }
    }
    flush();
    unrolled<kRows>([&](auto i) __attribute__((always_inline)) {
      unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
        auto* to = sums + i * kColumns + v * Simd::kLanes;
        if constexpr (groups) {
          using Floats = typename Simd::Floats;
          const auto acc_g = __builtin_convertvector(
              total[i][v] - units.minus[i * units.minus_stride + unit], Floats);
          auto& totals = *reinterpret_cast<Floats*>(to);
          totals += acc_g * *reinterpret_cast<const Floats*>(units.weight_scale + unit * kColumns +
                                                             v * Simd::kLanes);
        } else {
          *reinterpret_cast<typename Simd::Int32*>(to) += total[i][v];
        }
      });
    });
  }
}

// Rows [n, n + kVectors * kLanes) of a matrix of 32-bit words, transposed; those from n_end on
// repeat the last.
template <class Simd, int kVectors>
void transpose_block(const void* from, int64_t stride, int64_t n, int64_t n_end, int64_t words,
                     uint32_t* to) {
  for (int64_t v = 0; v < kVectors; ++v) {
    const int64_t first = std::min(n + v * Simd::kLanes, n_end - 1);
    transpose_words<Simd>(static_cast<const uint8_t*>(from) + first * stride, stride, n_end - first,
                          words, to + v * Simd::kLanes, kVectors * Simd::kLanes);
  }
}

// All of `tile`, in blocks of kVectors * kLanes columns.
template <class Simd, int kVectors>
void blocks_by_lanes(const QuantizedRows& x, const TernaryWeight& weight, const LinearOutput& out,
                     const Tile& tile) {
  constexpr int64_t kColumns = kVectors * Simd::kLanes;
  const int64_t rows = tile.m_end - tile.m_begin, words = weight.stride / 4;
  const int64_t group_words = weight.group_size / kTernaryPerWord;
  const int64_t groups = group_words == 0 ? 0 : words / group_words;
  const int64_t panel_words =  // whole groups
      groups == 0 ? kPanelWords : std::max(kPanelWords / group_words, int64_t{1}) * group_words;

  const int64_t panel_size = round_up(std::min(panel_words, words), Simd::kLanes) * kColumns;
  const int64_t scale_size = round_up(groups, Simd::kLanes) * kColumns;
  const Scratch transposed((panel_size + scale_size) * int64_t(sizeof(uint32_t)));
  uint32_t* const panel = transposed.data<uint32_t>();
  uint32_t* const scale = panel + panel_size;
  const Scratch added((kColumns + groups) * rows * int64_t(sizeof(int32_t)));
  int32_t* const sums = added.data<int32_t>();
  int32_t* const minus = sums + kColumns * rows;
  if (groups > 0) sum_groups(x, weight.group_size, groups, tile, minus);

  for (int64_t n = tile.n_begin; n < tile.n_end; n += kColumns) {
    const int64_t n_end = std::min(n + kColumns, tile.n_end);
    if (groups > 0)
      transpose_block<Simd, kVectors>(weight.scale, groups * int64_t(sizeof(float)), n, n_end,
                                      groups, scale);
    std::fill_n(sums, kColumns * rows, 0);
    for (int64_t begin = 0; begin < words; begin += panel_words) {
      const int64_t count = std::min(panel_words, words - begin);
      transpose_block<Simd, kVectors>(weight.packed + begin * 4, weight.stride, n, n_end, count,
                                      panel);
      const uint8_t* ahead = weight.packed + (n + kColumns) * weight.stride + begin * kColumns * 4;
      for_even_pieces(rows, Simd::kTileRows, 1, [&](int64_t i, int64_t tile_rows) {
        const int8_t* q = x.q + (tile.m_begin + i) * x.stride + begin * kTernaryPerWord;
        int32_t* const to = sums + i * kColumns;
        with_count<Simd::kTileRows>(tile_rows, [&](auto constant) {
          if (groups == 0)
            return multiply_tile<Simd, constant, kVectors, false>(
                panel, ahead, q, x.stride, {1, count, nullptr, 0, nullptr}, to);
          const int64_t g = begin / group_words;
          multiply_tile<Simd, constant, kVectors, true>(
              panel, ahead, q, x.stride,
              {count / group_words, group_words, minus + i * groups + g, groups,
               reinterpret_cast<const float*>(scale) + g * kColumns},
              to);
        });
      });
    }
    if (groups == 0)
      finish_rows(x, weight, sums, kColumns, 1, nullptr, {weight.scale, weight.per_tensor}, out,
                  {tile.m_begin, tile.m_end, n, n_end});
    else
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t m = tile.m_begin + i;
        finish_groups(reinterpret_cast<const float*>(sums + i * kColumns), x.scale[m], out, m, n,
                      n_end - n);
      }
  }
}

// All of `tile`.
template <class Simd>
void linear_by_lanes(const QuantizedRows& x, const TernaryWeight& weight, const LinearOutput& out,
                     const Tile& tile) {
  Tile blocks = tile,
       last = tile;  // of two vectors; what one vector can hold beyond them
  const int64_t rest = (tile.n_end - tile.n_begin) % (2 * Simd::kLanes);
  blocks.n_end = last.n_begin = tile.n_end - (rest > Simd::kLanes ? 0 : rest);
  blocks_by_lanes<Simd, 2>(x, weight, out, blocks);
  if (last.n_begin < last.n_end) blocks_by_lanes<Simd, 1>(x, weight, out, last);
}

}  // namespace
}  // namespace trine
