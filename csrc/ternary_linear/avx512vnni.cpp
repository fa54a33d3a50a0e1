// Codes are multiplied as they lie, without shifting or unpacking them. 16 bytes of a packed row,
// 64 codes, are loaded into all four quarters of a register, and quarter i keeps only bits
// 2i..2i+1 of each byte: code << 2i of k = 16w + 4i + j. The sums of quarter i are then 4^i times
// too large, which one shift undoes, exactly, when a tile is finished. So 64 codes cost one load
// and one AND beside the vpdpbusd of each activation row.
//
// What bounds it: with one row, reading the weight: the hardware prefetches within a page only, so
// every tile prefetches the next one (4096 x 4096 from memory: 160 us, without it 310). From the
// caches the loads, five for 256 products. From four rows on, the two vpdpbusd per cycle.
#include "common/x86/gemm_avx512vnni.h"
#include "ternary_linear/grouped.h"
#include "ternary_linear/ternary_linear.h"

namespace trine {
namespace {

struct TernaryCodes {
  static constexpr int32_t kOffset = 1;
  static constexpr int64_t kMaxTileRows = 6;
  using Row = const uint8_t*;

  Row data;
  int64_t stride;
  int64_t ahead = kTileColumns * stride;       // bytes to the line to prefetch: the next tile
  int64_t whole_k = stride * kTernaryPerByte;  // packed rows are whole: none has a tail

  Row row(int64_t n) const { return data + n * stride; }
  static __m512i load(Row row, int64_t k) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + (k >> 2)));
    const __m512i bits = _mm512_set_epi64(kBits << 6, kBits << 6, kBits << 4, kBits << 4,
                                          kBits << 2, kBits << 2, kBits, kBits);
    return _mm512_and_si512(_mm512_broadcast_i32x4(words), bits);
  }
  static __m512i load_tail(Row row, int64_t k) { return load(row, k); }
  // Inlined by force: gcc 12 drops a call whose only effect is a prefetch.
  [[gnu::always_inline]] void prefetch(Row row, int64_t k) const {
    if ((k & 255) == 0) _mm_prefetch(row + ahead + (k >> 2), _MM_HINT_T0);
  }

  // No sum overflows before: 4096 codes of up to 3 << 6 are at most 192 * 127 * 4096 < 2^31.
  static_assert(kStreamK <= 4096 && kSliceK <= 4096);
  static __m512i unscaled(__m512i sums) {
    return _mm512_srav_epi32(sums,
                             _mm512_set_epi32(6, 6, 6, 6, 4, 4, 4, 4, 2, 2, 2, 2, 0, 0, 0, 0));
  }

 private:
  static constexpr int64_t kBits = 0x0303030303030303;
};

}  // namespace

void ternary_linear_avx512vnni(const QuantizedRows& x, const TernaryWeight& weight,
                               const LinearOutput& out, const Tile& tile) {
  if (weight.group_size != 0) return grouped_linear<TernaryCodes>(x, weight, out, tile);
  integer_linear(x, TernaryCodes{weight.packed, weight.stride}, weight.k,
                 {weight.scale, weight.per_tensor}, out, tile);
}

}  // namespace trine
