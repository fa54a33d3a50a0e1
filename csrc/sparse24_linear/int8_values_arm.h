// 2:4-sparse int8 values for Arm's integer products: see gemm_dotprod.h for what a weight is.
//
// 64 columns are 16 groups of four. Quarter p holds column p of each group, so x is rearranged once
// per call: 64 of its columns as a 4 x 16 matrix. One table look-up by the 16 nibbles says for
// column p of each group whether it holds the first value, the second or none, an OR adds the place
// of the group's pair among the 32 values, and a second look-up takes the value: three instructions
// for 16 columns, besides three that make nibbles of 8 bytes.
//
// What bounds it, counted and not timed: with one row, the 15 instructions that decode 64 columns
// beside their four sdot; a Neoverse N1 runs them in ten cycles, 40 bytes of weight. With more
// rows, which share a panel of decoded bytes, the dense products: they cannot skip the zeros.
#pragma once

#include "common/arm/gemm_dotprod.h"
#include "sparse24_linear/sparse24_linear.h"

namespace trine {
namespace {

// Byte `nibble` of the table of column p: 0 or 1 where the column holds the group's first or second
// value. Elsewhere it is beyond the values, which makes a zero.
struct PlaceTable {
  uint8_t place[16];
};
constexpr PlaceTable place_table(int p) {
  PlaceTable table{};
  for (int nibble = 0; nibble < 16; ++nibble)
    table.place[nibble] = p == (nibble & 3) ? 0 : p == nibble >> 2 ? 1 : 0x80;
  return table;
}
inline constexpr PlaceTable kPlaceTables[4] = {place_table(0), place_table(1), place_table(2),
                                               place_table(3)};

struct SparseWeight {
  static constexpr int32_t kOffset = 0;
  static constexpr int64_t kMaxTileRows = 1;
  static constexpr int64_t kPanelRows = 2;  // as many instructions as decoding for each row anew
  struct Row {
    const int8_t* values;
    const uint8_t* indices;
  };
  struct Groups {
    int8x16x2_t values;  // of 16 groups
    uint8x16_t nibbles;
  };

  Sparse24Int8Weight weight;
  int64_t whole_k = weight.chunks / 2 * 64;

  Row row(int64_t n) const {
    return {weight.values + n * weight.chunks * kSparse24Values,
            weight.indices + n * weight.chunks * kSparse24Indices};
  }
  [[gnu::always_inline]] static Groups fetch(const Row& row, int64_t k) {
    const int8_t* values = row.values + k / 2;
    return {{{vld1q_s8(values), vld1q_s8(values + 16)}}, nibbles(vld1_u8(row.indices + k / 8))};
  }
  // An odd number of chunks ends with half of 64 columns; the values of the other half are 0.
  [[gnu::always_inline]] static Groups fetch_tail(const Row& row, int64_t k) {
    uint8_t indices[8] = {};
    std::memcpy(indices, row.indices + k / 8, kSparse24Indices);
    return {{{vld1q_s8(row.values + k / 2), vdupq_n_s8(0)}}, nibbles(vld1_u8(indices))};
  }
  template <int p>
  [[gnu::always_inline]] static int8x16_t quarter(const Groups& groups) {
    const uint8x16_t pairs = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    const uint8x16_t place = vqtbl1q_u8(vld1q_u8(kPlaceTables[p].place), groups.nibbles);
    return vqtbl2q_s8(groups.values, vorrq_u8(place, pairs));
  }

  static Bytes64 arranged(const int8_t* q) {
    const int8x16x4_t columns = vld4q_s8(q);
    return {{columns.val[0], columns.val[1], columns.val[2], columns.val[3]}};
  }

 private:
  static uint8x16_t nibbles(uint8x8_t indices) {
    return vcombine_u8(vzip1_u8(vand_u8(indices, vdup_n_u8(15)), vshr_n_u8(indices, 4)),
                       vzip2_u8(vand_u8(indices, vdup_n_u8(15)), vshr_n_u8(indices, 4)));
  }
};

}  // namespace
}  // namespace trine
