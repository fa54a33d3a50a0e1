// 16 bytes of a packed row, 64 codes, are loaded into both halves of a register, twice: first half
// i keeps bits 2i..2i+1 of each byte, then bits 2i+4..2i+5. One shift by lane and one AND give 32
// codes for the vpmaddubsw of each activation row.
//
// What bounds it: with one row from memory, reading the weight; with few, the vector instructions,
// two per 32 products and row and two per 32 codes; with many, which share a panel of unpacked
// codes, the two vpmaddubsw per cycle of the core.
// Every tile prefetches the next, because the hardware does so within a page only.
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
  int64_t ahead = kTileColumns * stride;       // bytes to the line to prefetch: the next tile
  int64_t whole_k = stride * kTernaryPerByte;  // packed rows are whole: none has a tail

  Row row(int64_t n) const { return data + n * stride; }
  __m256i load(Row row, int64_t k) const {
    if ((k & 255) == 0) _mm_prefetch(row + ahead + (k >> 2), _MM_HINT_T0);
    alignas(32) static constexpr int32_t kShifts[2][8] = {{0, 0, 0, 0, 2, 2, 2, 2},
                                                          {4, 4, 4, 4, 6, 6, 6, 6}};
    const auto* words = reinterpret_cast<const __m128i*>(row + (k >> 6) * 16);
    const auto* shifts = reinterpret_cast<const __m256i*>(kShifts[k >> 5 & 1]);
    const __m256i shifted = _mm256_srlv_epi32(_mm256_broadcastsi128_si256(_mm_loadu_si128(words)),
                                              _mm256_load_si256(shifts));
    return _mm256_and_si256(shifted, _mm256_set1_epi8(3));
  }
  __m256i load_tail(Row row, int64_t k) const { return load(row, k); }
};

// From this many activation rows on, unpacking the weight to one byte per code costs less than
// unpacking it in registers for every three of them. Measured: even at 8 rows, 1.25 times as fast
// at 32.
constexpr int64_t kPanelRows = 12;

// The codes of rows [n, n_end), in the order in which `load` gives them.
void unpack_rows(const TernaryCodes& weight, int64_t n, int64_t n_end, uint8_t* panel) {
  for (; n < n_end; ++n, panel += weight.whole_k)
    for (int64_t k = 0; k < weight.whole_k; k += 32)
      _mm256_store_si256(reinterpret_cast<__m256i*>(panel + k), weight.load(weight.row(n), k));
}

void linear_through_panel(const QuantizedRows& x, const TernaryCodes& weight, int64_t k,
                          const Scaling& scaling, const LinearOutput& out, const Tile& tile) {
  const int64_t stride = weight.whole_k, columns = block_columns(stride);
  const Scratch scratch(columns * stride);
  uint8_t* panel = scratch.data<uint8_t>();
  for (int64_t n = tile.n_begin; n < tile.n_end; n += columns) {
    const int64_t n_end = std::min(n + columns, tile.n_end);
    unpack_rows(weight, n, n_end, panel);
    integer_linear(x, PanelWeight<true>{panel, stride, n}, k, scaling, out,
                   {tile.m_begin, tile.m_end, n, n_end});
  }
}

}  // namespace

void ternary_linear_avx2(const QuantizedRows& x, const TernaryWeight& weight,
                         const LinearOutput& out, const Tile& tile) {
  if (weight.group_size != 0) return grouped_linear<TernaryCodes>(x, weight, out, tile);
  const TernaryCodes codes{weight.packed, weight.stride};
  const Scaling scaling{weight.scale, weight.per_tensor};
  if (tile.m_end - tile.m_begin >= kPanelRows)
    linear_through_panel(x, codes, weight.k, scaling, out, tile);
  else
    integer_linear(x, codes, weight.k, scaling, out, tile);
}

}  // namespace trine
