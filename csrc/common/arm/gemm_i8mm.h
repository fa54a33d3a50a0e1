// Integer matrix products on Arm's matrix instructions (Armv8.2-A with dotprod and i8mm): the
// weights of gemm_dotprod.h, two rows at a time.
//
// smmla multiplies a 2 x 8 by an 8 x 2 matrix of signed bytes, twice the products of an sdot, and
// adds to a 2 x 2 matrix of int32. Its operands are pairs of rows, eight bytes of each: rows of x
// are interleaved so once per call, those of the weight as they are fetched, or, where more rows of
// x pass than one tile takes, once into a panel.
//
// Call i8mm_linear(x, weight, k, scaling, out, tile). One row of x takes dotprod_linear, and so may
// anything that needs its accumulate_tile. Beyond what gemm_dotprod.h asks of a weight it may have
//   kElementwise                   // quarter works byte by byte, so that rows can be interleaved
//                                  // before it
//
// What bounds it, by counting instructions (it has not been timed): with many rows, the smmla, of
// which a Neoverse V1 starts four per cycle: a step of an 8 x 4 tile is 16 of them on 12 loads, of
// which it starts three per cycle, so that both limits meet. With few rows, the interleaving of the
// weight, one zip for two rows of x (INT8) or for eight (ternary).
#pragma once

#include "common/arm/gemm_dotprod.h"

namespace trine {
namespace {

// The first (0) or last (1) eight bytes of both.
template <int half>
[[gnu::always_inline]] inline int8x16_t interleaved(int8x16_t a, int8x16_t b) {
  const int64x2_t first = vreinterpretq_s64_s8(a), second = vreinterpretq_s64_s8(b);
  return vreinterpretq_s8_s64(half == 0 ? vzip1q_s64(first, second) : vzip2q_s64(first, second));
}

// A weight of gemm_dotprod.h as pairs of rows.
template <class Weight>
struct Pairs {
  static constexpr int32_t kOffset = Weight::kOffset;
  static constexpr int64_t kMaxTileRows = 8;  // 20 KiB of activations stay in an L1 of 64 KiB
  static constexpr int64_t kRowStep = 2;
  struct Pair {
    typename Weight::Row first, second;
  };
  template <class Fetched>
  struct FetchedPair {
    Fetched first, second;
  };

  Weight weight;
  int64_t whole_k = weight.whole_k;

  // Rows n and n + 1; what lies beyond last_n repeats it.
  Pair pair(int64_t n, int64_t last_n) const {
    return {weight.row(std::min(n, last_n)), weight.row(std::min(n + 1, last_n))};
  }
  auto fetch(const Pair& pair, int64_t k) const {
    return combined(weight.fetch(pair.first, k), weight.fetch(pair.second, k));
  }
  auto fetch_tail(const Pair& pair, int64_t k) const {
    return combined(weight.fetch_tail(pair.first, k), weight.fetch_tail(pair.second, k));
  }
  // Half of quarter i, of both rows.
  template <int i, int half, class Fetched>
  [[gnu::always_inline]] static int8x16_t bytes(const Fetched& fetched) {
    if constexpr (requires { Weight::kElementwise; })
      return Weight::template quarter<i>(half == 0 ? fetched.first : fetched.second);
    else
      return interleaved<half>(Weight::template quarter<i>(fetched.first),
                               Weight::template quarter<i>(fetched.second));
  }

 private:
  template <class Fetched>
  static FetchedPair<Fetched> combined(const Fetched& first, const Fetched& second) {
    if constexpr (requires { Weight::kElementwise; })
      return {interleaved<0>(first, second), interleaved<1>(first, second)};
    else
      return {first, second};
  }
};

// Pairs in memory: of each 16 columns, the first eight of both rows and the last eight.
template <int32_t offset>
struct PairPanel {
  static constexpr int32_t kOffset = offset;
  static constexpr int64_t kMaxTileRows = 8;
  static constexpr int64_t kRowStep = 2;

  const int8_t* data;
  int64_t stride;  // of one row, a multiple of 64
  int64_t first_n;
  int64_t whole_k = stride;

  const int8_t* pair(int64_t n, int64_t last_n) const {
    return data + (std::min(n, last_n) - first_n) / 2 * 2 * stride;
  }
  static const int8_t* fetch(const int8_t* pair, int64_t k) { return pair + 2 * k; }
  static const int8_t* fetch_tail(const int8_t* pair, int64_t) { return pair; }  // never called
  template <int i, int half>
  static int8x16_t bytes(const int8_t* columns) {
    return vld1q_s8(columns + 32 * i + 16 * half);
  }
};

// x.q holds interleaved pairs of rows; the second of the last pair may be missing from the result.
template <int kRows, class Weight>
  requires requires { Weight::kRowStep; }
void accumulate_tile(const Weight& weight, const TileRows& x, int64_t n, int64_t last_n,
                     const Slice& k, int32_t* sums) {
  constexpr int kPairs = (kRows + 1) / 2;
  const auto pair0 = weight.pair(n, last_n), pair1 = weight.pair(n + 2, last_n);

  int32x4_t acc[kPairs][2] = {};
  const auto step = [&](int64_t at, const auto& w0, const auto& w1) __attribute__((always_inline)) {
    unrolled<8>([&](auto e) __attribute__((always_inline)) {  // eighths of 64 columns
      const int8x16_t b0 = Weight::template bytes<e / 2, e % 2>(w0);
      const int8x16_t b1 = Weight::template bytes<e / 2, e % 2>(w1);
      unrolled<kPairs>([&](auto p) __attribute__((always_inline)) {
        const int8x16_t q = vld1q_s8(x.q + p * 2 * x.stride + 2 * at + 16 * e);
        acc[p][0] = vmmlaq_s32(acc[p][0], q, b0);
        acc[p][1] = vmmlaq_s32(acc[p][1], q, b1);
      });
    });
  };

  const int64_t whole_end = std::min(k.end, weight.whole_k);
  int64_t at = k.begin;
  for (; at < whole_end; at += 64) step(at, weight.fetch(pair0, at), weight.fetch(pair1, at));
  if (at < k.end) step(at, weight.fetch_tail(pair0, at), weight.fetch_tail(pair1, at));

  unrolled<kRows>([&](auto m) {
    int32_t* row = sums + m * kMaxBlockColumns;
    const int64x2_t left = vreinterpretq_s64_s32(acc[m / 2][0]);
    const int64x2_t right = vreinterpretq_s64_s32(acc[m / 2][1]);
    const int32x4_t sum =
        vreinterpretq_s32_s64(m % 2 == 0 ? vzip1q_s64(left, right) : vzip2q_s64(left, right));
    vst1q_s32(row, vaddq_s32(vld1q_s32(row), sum));
  });
}

template <class Weight>
Bytes64 arranged(const int8_t* q) {
  if constexpr (requires { Weight::arranged(q); }) {
    return Weight::arranged(q);
  } else {
    Bytes64 bytes;
    for (int i = 0; i < 4; ++i) bytes.quarter[i] = vld1q_s8(q + 16 * i);
    return bytes;
  }
}

// Interleaves rows of x; the last one, if it is alone, with zeros.
template <class Weight>
void interleave_rows(const int8_t* q, int64_t stride, int64_t rows, int8_t* to) {
  for (int64_t m = 0; m < rows; m += 2, to += 2 * stride)
    for (int64_t k = 0; k < stride; k += 64) {
      const Bytes64 first = arranged<Weight>(q + m * stride + k);
      const Bytes64 second = m + 1 < rows ? arranged<Weight>(q + (m + 1) * stride + k) : Bytes64{};
      for (int i = 0; i < 4; ++i) {
        vst1q_s8(to + 2 * k + 32 * i, interleaved<0>(first.quarter[i], second.quarter[i]));
        vst1q_s8(to + 2 * k + 32 * i + 16, interleaved<1>(first.quarter[i], second.quarter[i]));
      }
    }
}

// A weight that goes through a panel for two rows already takes many registers to decode.
template <class Weight>
constexpr bool decoding_is_dear() {
  if constexpr (requires { Weight::kPanelRows; })
    return Weight::kPanelRows <= 2;
  else
    return false;
}

template <class Weight>
void i8mm_linear(const QuantizedRows& x, const Weight& weight, int64_t k, const Scaling& scaling,
                 const LinearOutput& out, const Tile& tile) {
  const int64_t rows = tile.m_end - tile.m_begin;
  if (rows == 1) return dotprod_linear(x, weight, k, scaling, out, tile);

  const Scratch x_storage(round_up(rows, 2) * x.stride);
  int8_t* x_pairs = x_storage.data<int8_t>();
  interleave_rows<Weight>(x.q + tile.m_begin * x.stride, x.stride, rows, x_pairs);
  const TileCall call = with_activations(x_pairs, x, out, tile);
  const Pairs<Weight> weight_pairs{weight};
  if constexpr (!decoding_is_dear<Weight>())
    if (rows <= Pairs<Weight>::kMaxTileRows)
      return integer_linear(call.x, weight_pairs, k, scaling, call.out, call.tile);

  const int64_t stride = round_up(k, 64);
  const Scratch storage(block_columns(stride) * stride);
  int8_t* panel = storage.data<int8_t>();
  for_blocks(stride, scaling, call.tile, [&](const Tile& block, const Scaling& block_scaling) {
    int8_t* to = panel;
    for (int64_t n = block.n_begin; n < block.n_end; n += 2, to += 2 * stride) {
      const auto pair = weight_pairs.pair(n, block.n_end - 1);
      for_row(weight_pairs, pair, k, [&](int64_t at, const auto& fetched) {
        unrolled<8>([&](auto e) {
          vst1q_s8(to + 2 * at + 16 * e, Pairs<Weight>::template bytes<e / 2, e % 2>(fetched));
        });
      });
    }
    integer_linear(call.x, PairPanel<Weight::kOffset>{panel, stride, block.n_begin}, k,
                   block_scaling, call.out, block);
  });
}

}  // namespace
}  // namespace trine
