// 16 bytes of a packed row, 64 codes, are loaded into both halves of a register, twice: first half
// i keeps bits 2i..2i+1 of each byte, then bits 2i+4..2i+5. One shift by lane and one AND give 32
// codes for the vpmaddubsw of each activation row.
//
// What bounds it: with one row from memory, reading the weight; else the vector instructions, two
// per 32 products and row and three per 32 codes.
#include "common/x86/gemm_avx2.h"
#include "ternary_linear/grouped.h"
#include "ternary_linear/ternary_linear.h"

namespace trine {
namespace {

struct TernaryCodes {
  static constexpr bool kCodes = true;
  static constexpr int32_t kOffset = 1;
  static constexpr int64_t kMaxTileRows = kTileRows<true>;
  using Row = const uint8_t*;

  Row data;
  int64_t stride;
  int64_t whole_k = stride * kTernaryPerByte;  // packed rows are whole: none has a tail

  Row row(int64_t n) const { return data + n * stride; }
  static __m256i load(Row row, int64_t k) {
    alignas(32) static constexpr int32_t kShifts[2][8] = {{0, 0, 0, 0, 2, 2, 2, 2},
                                                          {4, 4, 4, 4, 6, 6, 6, 6}};
    const auto* words = reinterpret_cast<const __m128i*>(row + (k >> 6) * 16);
    const auto* shifts = reinterpret_cast<const __m256i*>(kShifts[k >> 5 & 1]);
    const __m256i shifted = _mm256_srlv_epi32(_mm256_broadcastsi128_si256(_mm_loadu_si128(words)),
                                              _mm256_load_si256(shifts));
    return _mm256_and_si256(shifted, _mm256_set1_epi8(3));
  }
  static __m256i load_tail(Row row, int64_t k) { return load(row, k); }
};

}  // namespace

void ternary_linear_avx2(const QuantizedRows& x, const TernaryWeight& weight,
                         const LinearOutput& out, const Tile& tile) {
  if (weight.group_size != 0) return grouped_linear<TernaryCodes>(x, weight, out, tile);
  integer_linear(x, TernaryCodes{weight.packed, weight.stride}, weight.k,
                 {weight.scale, weight.per_tensor}, out, tile);
}

}  // namespace trine
