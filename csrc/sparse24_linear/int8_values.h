// What the vector kernels of int8 values share: the decoding table, and the choice between decoding
// in registers and decoding to a dense panel.
#pragma once

#include <type_traits>

#include "common/gemm_blocking.h"
#include "sparse24_linear/sparse24_linear.h"

namespace trine {
namespace {

// The byte shuffle that spreads a group's two values over its four columns, by the group's nibble:
// byte p is 0 or 1 where column p holds the first or the second value; elsewhere it is 0x80, which
// makes a zero.
constexpr uint32_t spread(uint32_t nibble) {
  uint32_t shuffle = 0;
  for (uint32_t p = 0; p < 4; ++p) {
    const uint32_t byte = p == (nibble & 3) ? 0 : p == nibble >> 2 ? 1 : 0x80;
    shuffle |= byte << (8 * p);
  }
  return shuffle;
}

struct SparseRow {
  const int8_t* values;
  const uint8_t* indices;
};

[[maybe_unused]] inline SparseRow sparse_row(const Sparse24Int8Weight& weight, int64_t n) {
  return {weight.values + n * weight.chunks * kSparse24Values,
          weight.indices + n * weight.chunks * kSparse24Indices};
}

// What FetchedAhead asks for: two columns are a byte of values, eight a byte of indices.
struct FetchedSparse {
  Sparse24Int8Weight weight;

  int64_t row_length() const { return weight.chunks * kSparse24Columns; }
  [[gnu::always_inline]] void prefetch(int64_t at, int64_t lines) const {
    constexpr int kForReading = 0, kIntoL2 = 2;
    __builtin_prefetch(weight.indices + at / 8, kForReading, kIntoL2);
    for (at /= 2; lines > 0; lines -= 2, at += 64)
      __builtin_prefetch(weight.values + at, kForReading, kIntoL2);
  }
  [[gnu::always_inline]] void touch(int64_t at, int64_t count) const {
    touch_pages(weight.values + at / 2, count / 2);
    touch_pages(weight.indices + at / 8, count / 8);
  }
};

// Weight decodes its rows as they are loaded. Where more activation rows pass than one tile takes,
// it is decoded once, to a panel of dense rows that stays in L2.
template <class Weight, class Panel>
void sparse24_int8_tile(const QuantizedRows& x, const Sparse24Int8Weight& weight,
                        const LinearOutput& out, const Tile& tile) {
  const Weight sparse{{weight}};
  const int64_t k = weight.chunks * kSparse24Columns;
  if (tile.m_end - tile.m_begin <= Weight::kMaxTileRows)
    return integer_linear(x, sparse, k, {weight.scale}, out, tile);

  const int64_t stride = round_up(k, 64), columns = block_columns(stride);
  const Scratch panel(columns * stride);
  using Byte = std::remove_const_t<std::remove_pointer_t<decltype(Panel::data)>>;
  auto* dense = panel.data<Byte>();
  for (int64_t n = tile.n_begin; n < tile.n_end; n += columns) {
    const int64_t n_end = std::min(n + columns, tile.n_end);
    for (int64_t row = n; row < n_end; ++row) sparse.decode_row(row, dense + (row - n) * stride);
    integer_linear(x, Panel{dense, stride, n}, k, {weight.scale}, out,
                   {tile.m_begin, tile.m_end, n, n_end});
  }
}

}  // namespace
}  // namespace trine
