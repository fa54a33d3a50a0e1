// Weights in {-1, 0, 1} of which at most two in every four consecutive columns (a group) are not 0,
// int8 activations; acc = sum over k of q[m][k] * w[n][k], exact in int32. One scale for the
// weight, or one per row:
//   y[m][n] = (float(acc) * x.scale[m]) * weight_scale[n] + bias[n]
// so that the bits are those of ternary_linear on the same dense weight.
//
// Packed weight: six bits a group, 1.5 bits a weight, where ternary_linear has two:
//   bits 0-1  column of the first value, 0 to 2; 3: there is none     bit 2  it is -1
//   bits 3-4  column of the second value, 1 to 3; 0: there is none    bit 5  it is -1
// A row is one string of bits, lowest first, uint8 [n][16 * ceil(6 * ceil(k / 4) / 128)]: group g
// is bits 6g .. 6g + 5, 8 groups are 6 bytes, and every row starts on a 16-byte boundary. Groups
// past k hold no value. Two values of a group lie in ascending columns, so that the columns' four
// bits are the index of sparse24_linear and of mma.sp; a pair that does not ascend marks a group of
// one value or none. Any bits are some weight: where both values are said to lie in one column, it
// is +1 unless both are -1.
//
// Why so. A group has 33 states: 1.26 bits a weight at the least. Three groups in 16 bits (1.33)
// take a division by 33 apiece, twice as many instructions as memory gives time for on Zen 4. Six
// bits are one step of a look-up: vpermb has 64 entries. It yields a byte of four two-bit codes,
// the form of ternary_linear, whose kernels go on from there. To decode 64 groups, 256 weights,
// takes
//   AVX-512 VBMI   3 instructions: two that spread the fields to bytes (vpermb, vpmultishiftqb),
//   one
//                  look-up. Indices and signs in places of their own, as in sparse24_linear, would
//                  take 6: two to spread each, one to join them, one look-up
//   AVX2           2 x 17: two loads, a shuffle, eight that move the fields to bytes, and for each
//                  value of a group a look-up of eight entries, joined by OR; the bits of a value
//                  are together, so that its look-up needs no other's
//   NEON           4 x 7: a load, a look-up and four that move the fields to bytes, one look-up
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/linear.h"

namespace trine {

inline constexpr int64_t kTernary24Group = 4;      // columns
inline constexpr int64_t kTernary24GroupBits = 6;  // of the packed weight
// As kTernaryMaxK: its kernels add up the products.
inline constexpr int64_t kTernary24MaxK = int64_t{1} << 22;

struct Ternary24Weight {
  const uint8_t* packed;
  int64_t stride;  // bytes from row to row
  int64_t k;
  const float* scale;  // one value, or [n]
  bool per_tensor;     // scale is one value
};

using Ternary24LinearFn = void(const QuantizedRows& x, const Ternary24Weight& weight,
                               const LinearOutput& out, const Tile& tile);

struct Ternary24LinearKernel {
  Isa needs;
  Ternary24LinearFn* run;
};

Ternary24LinearFn ternary24_linear_scalar, ternary24_linear_avx2, ternary24_linear_avx2vnni,
    ternary24_linear_avx2vnni_evex, ternary24_linear_avx512vnni, ternary24_linear_avx512vbmi,
    ternary24_linear_dotprod, ternary24_linear_i8mm;

namespace {  // kernel files include this: see float_types.h

[[maybe_unused]] inline int64_t ternary24_row_bytes(int64_t k) {
  return round_up(round_up(k, kTernary24Group) / kTernary24Group * kTernary24GroupBits, 128) / 8;
}

// The codes of ternary_linear, w + 1, of a group's four columns: column p in bits 2p, 2p + 1. The
// flip of 0, 1 and 3 to 1, 0 and 2 comes last, so that two values join by OR.
constexpr uint32_t ternary24_first_value(uint32_t bits) {
  const uint32_t column = bits & 3, code = (bits & 4) != 0 ? 1 : 3;
  return column == 3 ? 0 : code << 2 * column;
}
constexpr uint32_t ternary24_second_value(uint32_t bits) {
  const uint32_t column = bits & 3, code = (bits & 4) != 0 ? 1 : 3;
  return column == 0 ? 0 : code << 2 * column;
}
constexpr uint32_t kTernary24Flip = 0x55;
constexpr uint8_t ternary24_codes(uint32_t group) {
  return static_cast<uint8_t>(
      (ternary24_first_value(group & 7) | ternary24_second_value(group >> 3)) ^ kTernary24Flip);
}

}  // namespace
}  // namespace trine
