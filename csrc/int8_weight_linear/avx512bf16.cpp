// Many rows of bf16 on AVX512-BF16, in pairs of columns; see tiles.h. Codes are exact in bf16, and
// scales are applied to the fp32 sums.
//
// vdpbf16ps takes subnormal operands, products and sums for 0; else its sums err no more than those
// of fp32.
//
// What bounds it: as avx512.cpp, at twice the products of an instruction, so that converting the
// weight, six instructions for 16 codes, counts for more. Measured on Zen 4 at K = 2560, one
// thread: 203 GFLOP/s with 512 rows, 86% of 236; 201 with 128, 169 with 32, 103 with 8.
#include "common/x86/float_avx512.h"
#include "int8_weight_linear/codes_avx512.h"
#include "int8_weight_linear/tiles.h"

namespace trine {
namespace {

struct Simd : Floats512 {
  static constexpr int kPanelRows = 8, kPanelVectors = 3;
  static constexpr int64_t kStep = 2;

  static Vector multiply_add_step(Vector a, Vector b, Vector c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
  static void convert(const int8_t* const* rows, int64_t k, float* to, int64_t stride) {
    const Quads quads(rows, k);
    unrolled<8>([&](auto i) {  // codes are exact in the high half of a float
      const __m512i first = _mm512_castps_si512(quads.floats<2 * i>());
      const __m512i second = _mm512_castps_si512(quads.floats<2 * i + 1>());
      _mm512_store_si512(to + i * stride, _mm512_or_si512(_mm512_srli_epi32(first, 16), second));
    });
  }
};

}  // namespace

void int8_weight_widen_avx512bf16(const FloatRows& x, int64_t m, int64_t stride, void* to) {
  const char* row = x.data + m * x.row_bytes;
  auto* copy = static_cast<bfloat16*>(to);
  std::copy_n(reinterpret_cast<const bfloat16*>(row), x.k, copy);
  std::fill(copy + x.k, copy + stride, bfloat16{0});
}

void int8_weight_linear_avx512bf16(const WideRows& x, const GroupedInt8Weight& weight,
                                   const LinearOutput& out, const Tile& tile) {
  many_rows<Simd>(x, weight, out, tile);
}

}  // namespace trine
