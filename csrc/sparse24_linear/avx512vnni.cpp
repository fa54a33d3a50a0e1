// Int8 values on AVX-512 VNNI: decoded to dense bytes on their way to vpdpbusd, see
// gemm_avx512vnni.h.
//
// What bounds it: with few rows, the seven instructions that decode 64 columns, about as fast as
// their 40 bytes come from memory; with many, the dense vpdpbusd, which cannot skip the zeros.
#include "common/x86/gemm_avx512vnni.h"
#include "sparse24_linear/int8_values.h"

namespace trine {
namespace {

struct SparseWeight : FetchedSparse {
  static constexpr int32_t kOffset = 128;
  static constexpr int64_t kMaxTileRows = 6;
  using Row = SparseRow;

  int64_t whole_k = weight.chunks * kSparse24Columns / 64 * 64;

  SparseRow row(int64_t n) const { return sparse_row(weight, n); }

  static __m512i load(const SparseRow& row, int64_t k) {
    const auto* values = reinterpret_cast<const __m256i*>(row.values + k / 2);
    return decode(_mm256_loadu_si256(values), _mm_loadu_si64(row.indices + k / 8));
  }
  // An odd number of chunks ends with half of 64 columns. The nibbles of the other half are 0, and
  // so are its values: it decodes to zeros.
  static __m512i load_tail(const SparseRow& row, int64_t k) {
    const auto* values = reinterpret_cast<const __m128i*>(row.values + k / 2);
    return decode(_mm256_zextsi128_si256(_mm_loadu_si128(values)),
                  _mm_loadu_si32(row.indices + k / 8));
  }
  void decode_row(int64_t n, uint8_t* dense) const {
    const SparseRow from = row(n);
    for (int64_t k = 0; k < whole_k; k += 64) _mm512_store_si512(dense + k, load(from, k));
    if (weight.chunks % 2 != 0) _mm512_store_si512(dense + whole_k, load_tail(from, whole_k));
  }

 private:
  // 64 columns from 32 values and 16 nibbles, made unsigned: value + 128.
  static __m512i decode(__m256i values, __m128i indices) {
    const __m512i word = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i shift =
        _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __m512i spread_of_nibble =
        _mm512_setr_epi32(spread(0), spread(1), spread(2), spread(3), spread(4), spread(5),
                          spread(6), spread(7), spread(8), spread(9), spread(10), spread(11),
                          spread(12), spread(13), spread(14), spread(15));
    // Which two of the eight values in its 128-bit lane a group takes.
    const __m512i pair = _mm512_set4_epi32(0x06060606, 0x04040404, 0x02020202, 0);

    const __m512i words = _mm512_permutexvar_epi32(word, _mm512_castsi128_si512(indices));
    const __m512i nibbles = _mm512_srlv_epi32(words, shift);  // in the low four bits
    const __m512i shuffle = _mm512_permutexvar_epi32(nibbles, spread_of_nibble);  // reads only them
    const __m512i lanes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3),
                                                   _mm512_castsi256_si512(values));
    const __m512i dense = _mm512_shuffle_epi8(lanes, _mm512_or_si512(shuffle, pair));
    return _mm512_xor_si512(dense, _mm512_set1_epi8(static_cast<char>(0x80)));
  }
};

}  // namespace

void sparse24_int8_avx512vnni(const QuantizedRows& x, const Sparse24Int8Weight& weight,
                              const LinearOutput& out, const Tile& tile) {
  sparse24_int8_tile<SparseWeight, PanelWeight<SparseWeight::kOffset>>(x, weight, out, tile);
}

}  // namespace trine
