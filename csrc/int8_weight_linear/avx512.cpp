// fp32 products on AVX-512, see tiles.h.
//
// What bounds it: with one row, the reading of the weight; up to six, a multiply-add per row and 16
// codes, beside two instructions that convert them; with more, the multiply-adds, 24 to 11 loads,
// and converting the weight, five instructions for 16 codes. Measured on Zen 4 at K = 2560, one
// thread: 20 GB/s with one row from memory; 105 GFLOP/s with 128 rows or more, 89% of the 118 that
// its multiply-adds allow, 94 with 32, 66 with 8.
#include "common/x86/float_avx512.h"
#include "int8_weight_linear/codes_avx512.h"
#include "int8_weight_linear/tiles.h"

namespace trine {
namespace {

struct Simd : Floats512 {
  static constexpr int kTileRows = 6;                      // by 4 weight rows: 24 sums
  static constexpr int kPanelRows = 8, kPanelVectors = 3;  // 24 sums, 3 registers of weight

  static Vector load_codes(const int8_t* p) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
  }
  static Vector multiply_add_step(Vector a, Vector b, Vector c) { return multiply_add(a, b, c); }
  static void convert(const int8_t* const* rows, int64_t k, float* to, int64_t stride) {
    const Quads quads(rows, k);
    unrolled<16>([&](auto i) { _mm512_store_ps(to + i * stride, quads.floats<i>()); });
  }
};

}  // namespace

void int8_weight_widen_avx512(const FloatRows& x, int64_t m, int64_t stride, void* to) {
  widen_row<Simd>(x, m, stride, to);
}

void int8_weight_linear_avx512(const WideRows& x, const GroupedInt8Weight& weight,
                               const LinearOutput& out, const Tile& tile) {
  int8_weight_tile<Simd>(x, weight, out, tile);
}

}  // namespace trine
