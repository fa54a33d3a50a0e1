// As in avx512vnni.cpp, codes are multiplied nearly as they lie. 16 bytes of a packed row, 64
// codes, are loaded into both halves of a register, twice: the lower half keeps bits 0..1 of each
// byte, the upper one bits 2..3 (code << 2); the second time the bytes are shifted by four bits
// first. The sums of the upper half are then 4 times too large, which one shift undoes, exactly,
// when a tile is finished.
#include "common/x86/gemm_avx2vnni.h"
#include "ternary_linear/grouped.h"
#include "ternary_linear/ternary_linear.h"

namespace trine {
namespace {

struct TernaryCodes {
  static constexpr int32_t kOffset = 1;
  static constexpr int64_t kMaxTileRows = kTileRows;
  using Row = const uint8_t*;

  Row data;
  int64_t stride;
  int64_t ahead = kTileColumns * stride;       // bytes to the line to prefetch: the next tile
  int64_t whole_k = stride * kTernaryPerByte;  // packed rows are whole: none has a tail

  Row row(int64_t n) const { return data + n * stride; }
  template <int half>
  static __m256i load(Row row, int64_t k) {
    const auto* words = reinterpret_cast<const __m128i*>(row + (k >> 6) * 16);
    __m256i codes = _mm256_broadcastsi128_si256(_mm_loadu_si128(words));
    if constexpr (half == 1) codes = _mm256_srli_epi32(codes, 4);
    return _mm256_and_si256(codes, _mm256_set_epi64x(kBits << 2, kBits << 2, kBits, kBits));
  }
  template <int half>
  static __m256i load_tail(Row row, int64_t k) {
    return load<half>(row, k);
  }
  [[gnu::always_inline]] void prefetch(Row row, int64_t k) const {
    if ((k & 255) == 0) _mm_prefetch(row + ahead + (k >> 2), _MM_HINT_T1);
  }

  // No sum overflows before: kSliceK codes of up to 3 << 2 are at most 12 * 127 * 4096 < 2^31.
  static_assert(kSliceK <= 4096);
  static __m256i unscaled(__m256i sums) {
    return _mm256_srav_epi32(sums, _mm256_set_epi32(2, 2, 2, 2, 0, 0, 0, 0));
  }

 private:
  static constexpr int64_t kBits = 0x0303030303030303;
};

}  // namespace

void ternary_linear_avx2vnni(const QuantizedRows& x, const TernaryWeight& weight,
                             const LinearOutput& out, const Tile& tile) {
  if (weight.group_size != 0) return grouped_linear<TernaryCodes>(x, weight, out, tile);
  integer_linear(x, TernaryCodes{weight.packed, weight.stride}, weight.k,
                 {weight.scale, weight.per_tensor}, out, tile);
}

}  // namespace trine
