// Ternary codes for Arm's integer products: see gemm_dotprod.h for what a weight is.
//
// 16 bytes of a packed row hold 64 codes. Quarter i is bits 2i..2i+1 of each byte, the codes of k =
// 16 w + 4 i + j at byte j of dword w; x is brought into that order once per call. A quarter is one
// shift and one AND; with one row of x it stays where it lies in its bytes, 4^i times too large,
// and is one AND: that halves the shifts, of which a Neoverse N1 starts one per cycle. The last
// quarter's top bit would be a sign, so it is shifted, and needs no AND.
//
// What bounds it, counted: with one row, per 64 codes one load, four instructions to decode and
// four sdot, four cycles of a Neoverse N1 (two of a V1) for 16 bytes.
#pragma once

#include "common/arm/gemm_dotprod.h"
#include "ternary_linear/grouped.h"
#include "ternary_linear/ternary_linear.h"

namespace trine {
namespace {

struct TernaryCodes {
  static constexpr int32_t kOffset = 1;
  static constexpr int64_t kMaxTileRows = 4;  // 16 sums, 4 registers of packed codes, 4 decoded
  // From here on the panel's stores and loads are fewer instructions than decoding for every four
  // rows anew.
  static constexpr int64_t kPanelRows = 12;
  static constexpr bool kElementwise = true;
  using Row = const uint8_t*;

  Row data;
  int64_t stride;
  int64_t ahead = kTileColumns * stride;       // bytes to the line to prefetch: the next tile
  int64_t whole_k = stride * kTernaryPerByte;  // packed rows are whole: none has a tail

  Row row(int64_t n) const { return data + n * stride; }
  static int8x16_t fetch(Row row, int64_t k) {
    return vreinterpretq_s8_u8(vld1q_u8(row + k / kTernaryPerByte));
  }
  static int8x16_t fetch_tail(Row row, int64_t k) { return fetch(row, k); }
  template <int i>
  static int8x16_t quarter(int8x16_t packed) {
    uint8x16_t codes = vreinterpretq_u8_s8(packed);
    if constexpr (i > 0) codes = vshrq_n_u8(codes, 2 * i);
    if constexpr (i < 3) codes = vandq_u8(codes, vdupq_n_u8(3));
    return vreinterpretq_s8_u8(codes);
  }

  // No sum overflows: 4096 codes of up to 3 << 4 are at most 48 * 127 * 4096 < 2^31.
  static_assert(slice_k(1, 1) <= 4096);
  static constexpr int kShift[4] = {0, 2, 4, 0};
  template <int i>
  static int8x16_t in_place(int8x16_t packed) {
    if constexpr (i == 3) return quarter<3>(packed);
    return vandq_s8(packed, vdupq_n_s8(3 << kShift[i]));
  }

  // The 16 dwords of 64 activations, transposed as a 4 x 4 matrix.
  static Bytes64 arranged(const int8_t* q) {
    const int32x4x4_t dwords = vld4q_s32(reinterpret_cast<const int32_t*>(q));
    return {{vreinterpretq_s8_s32(dwords.val[0]), vreinterpretq_s8_s32(dwords.val[1]),
             vreinterpretq_s8_s32(dwords.val[2]), vreinterpretq_s8_s32(dwords.val[3])}};
  }

  // As for packed INT8 rows, once for each line.
  void prefetch(Row row, int64_t k) const {
    if (k % 256 == 0) __builtin_prefetch(row + ahead + k / kTernaryPerByte);
  }
};

// Groups take dot products on every processor: their cost is in starting and finishing tiles.
[[maybe_unused]] inline void grouped_codes_linear(const QuantizedRows& x,
                                                  const TernaryWeight& weight,
                                                  const LinearOutput& out, const Tile& tile) {
  with_arranged_rows<TernaryCodes>(
      x, out, tile, [&](const QuantizedRows& rows, const LinearOutput& y, const Tile& part) {
        grouped_linear<TernaryCodes>(rows, weight, y, part);
      });
}

}  // namespace
}  // namespace trine
