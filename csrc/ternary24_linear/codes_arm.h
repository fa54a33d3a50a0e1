// Ternary codes of 2:4-sparse weights for Arm's integer products: see gemm_dotprod.h for what a
// weight is, ternary_linear/codes_arm.h for what follows on the decoding.
//
// 12 bytes of a packed row hold 16 groups, 64 weights. A look-up spreads three bytes over a dword,
// two shifts and a selection make four groups of it, and a look-up in four registers makes a byte
// of four codes of each. Quarter p is then column p of every group; x is brought into that order
// once per call.
//
// What bounds it, counted: with one row, per 64 weights one load, six instructions more than in
// ternary_linear, of which the last takes a Neoverse N1 several cycles, and four sdot.
#pragma once

#include <cstring>

#include "ternary24_linear/ternary24_linear.h"
#include "ternary_linear/codes_arm.h"

namespace trine {
namespace {

struct CodeTable {
  uint8_t codes[64];
};
constexpr CodeTable make_code_table() {
  CodeTable table{};
  for (uint32_t group = 0; group < 64; ++group) table.codes[group] = ternary24_codes(group);
  return table;
}
inline constexpr CodeTable kCodeTable = make_code_table();

struct Ternary24Codes {
  static constexpr int32_t kOffset = TernaryCodes::kOffset;
  static constexpr int64_t kMaxTileRows = TernaryCodes::kMaxTileRows;
  static constexpr int64_t kPanelRows = 5;  // a second decoding costs more than the panel
  static constexpr bool kElementwise = true;
  static constexpr int kShift[4] = {0, 2, 4, 0};
  using Row = const uint8_t*;

  Row data;
  int64_t stride;
  int64_t k;
  // A fetch takes 12 bytes and reads 16, but for the last, where the row may end.
  int64_t whole_k = (k + 63) / 64 * 64 - (k > 0 ? 64 : 0);
  int64_t ahead = kTileColumns * stride;  // bytes to the line to prefetch: the next tile

  Row row(int64_t n) const { return data + n * stride; }
  static int8x16_t fetch(Row row, int64_t at) { return decode(vld1q_u8(row + at / 64 * 12)); }
  int8x16_t fetch_tail(Row row, int64_t at) const {
    uint8_t bytes[16] = {};
    const int64_t first = at / 64 * 12;
    std::memcpy(bytes, row + first, static_cast<size_t>(std::min<int64_t>(16, stride - first)));
    return decode(vld1q_u8(bytes));
  }
  template <int i>
  static int8x16_t quarter(int8x16_t packed) {
    return TernaryCodes::quarter<i>(packed);
  }
  template <int i>
  static int8x16_t in_place(int8x16_t packed) {
    return TernaryCodes::in_place<i>(packed);
  }
  static Bytes64 arranged(const int8_t* q) {
    const int8x16x4_t columns = vld4q_s8(q);
    return {{columns.val[0], columns.val[1], columns.val[2], columns.val[3]}};
  }
  void prefetch(Row row, int64_t at) const {
    if (at % 256 == 0) __builtin_prefetch(row + ahead + at / 64 * 12);
  }

 private:
  static int8x16_t decode(uint8x16_t packed) {
    // Halves of dwords: bytes 0 and 1 with groups 0 and 1 from bits 0 and 6 on, bytes 1 and 2 with
    // groups 2 and 3 from bits 4 and 10 on.
    const uint8x16_t spread = {0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11};
    const int16x8_t to_even = {0, -4, 0, -4, 0, -4, 0, -4}, to_odd = {2, -2, 2, -2, 2, -2, 2, -2};
    const uint16x8_t halves = vreinterpretq_u16_u8(vqtbl1q_u8(packed, spread));
    const uint8x16_t even = vreinterpretq_u8_u16(vshlq_u16(halves, to_even));
    const uint8x16_t odd = vreinterpretq_u8_u16(vshlq_u16(halves, to_odd));
    const uint8x16_t low = vreinterpretq_u8_u16(vdupq_n_u16(0x00ff));
    const uint8x16_t groups = vandq_u8(vbslq_u8(low, even, odd), vdupq_n_u8(63));
    return vreinterpretq_s8_u8(vqtbl4q_u8(vld1q_u8_x4(kCodeTable.codes), groups));
  }
};

}  // namespace
}  // namespace trine
