// Int8 values on AVX2-VNNI: decoded to dense bytes on their way to vpdpbusd, see gemm_avx2vnni.h.
//
// What bounds it: with few rows, the nine instructions that decode 32 columns; with many, the dense
// vpdpbusd, which cannot skip the zeros.
#include <cstring>

#include "common/x86/gemm_avx2vnni.h"
#include "sparse24_linear/int8_values.h"

namespace trine {
namespace {

// 32 columns as dense bytes, from 16 values and 8 nibbles; k is a multiple of 32.
inline __m256i decode_32(const SparseRow& row, int64_t k) {
  const __m256i shift = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  // vpermd looks at three bits: nibble + (nibble >> 3) tells the six ascending pairs apart there.
  const __m256i spread_of_key =
      _mm256_setr_epi32(0, spread(8), spread(9), 0, spread(4), spread(12), spread(13), spread(14));
  // Which two of the sixteen values a group takes.
  const __m256i pair = _mm256_setr_epi32(0, 0x02020202, 0x04040404, 0x06060606, 0x08080808,
                                         0x0a0a0a0a, 0x0c0c0c0c, 0x0e0e0e0e);

  int32_t indices;
  std::memcpy(&indices, row.indices + k / 8, sizeof indices);
  const __m256i nibbles = _mm256_srlv_epi32(_mm256_set1_epi32(indices), shift);
  const __m256i key = _mm256_add_epi32(
      nibbles, _mm256_and_si256(_mm256_srli_epi32(nibbles, 3), _mm256_set1_epi32(1)));
  const __m256i shuffle = _mm256_permutevar8x32_epi32(spread_of_key, key);
  const __m256i values = _mm256_broadcastsi128_si256(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(row.values + k / 2)));
  return _mm256_shuffle_epi8(values, _mm256_or_si256(shuffle, pair));
}

struct SparseWeight : FetchedSparse {
  static constexpr int32_t kOffset = 128;
  static constexpr int64_t kMaxTileRows = kTileRows;
  using Row = SparseRow;

  int64_t whole_k = weight.chunks * kSparse24Columns / 64 * 64;

  SparseRow row(int64_t n) const { return sparse_row(weight, n); }

  template <int half>
  static __m256i load(const SparseRow& row, int64_t k) {
    return flip_signs(decode_32(row, k));
  }
  // An odd number of chunks ends with half of 64 columns.
  template <int half>
  static __m256i load_tail(const SparseRow& row, int64_t k) {
    return half == 0 ? load<half>(row, k) : _mm256_setzero_si256();
  }

  void decode_row(int64_t n, uint8_t* dense) const {
    auto* to = reinterpret_cast<__m256i*>(dense);
    const int64_t chunks = weight.chunks;
    for (int64_t c = 0; c < chunks; ++c)
      _mm256_store_si256(to + c, load<0>(row(n), c * kSparse24Columns));
    if (chunks % 2 != 0) _mm256_store_si256(to + chunks, _mm256_setzero_si256());
  }
};

}  // namespace

void sparse24_int8_avx2vnni(const QuantizedRows& x, const Sparse24Int8Weight& weight,
                            const LinearOutput& out, const Tile& tile) {
  sparse24_int8_tile<SparseWeight, PanelWeight<SparseWeight::kOffset>>(x, weight, out, tile);
}

}  // namespace trine
