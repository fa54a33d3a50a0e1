// Int8 values on AVX2-VNNI: decoded to dense bytes on their way to vpdpbusd, see gemm_avx2vnni.h.
//
// What bounds it: with few rows, the nine instructions that decode 32 columns; with many, the dense
// vpdpbusd, which cannot skip the zeros.
#include "common/x86/gemm_avx2vnni.h"
#include "sparse24_linear/int8_avx2.h"

namespace trine {
namespace {

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
