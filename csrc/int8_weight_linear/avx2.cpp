// fp32 products on AVX2, see tiles.h.
//
// What bounds it: with one row, the reading of the weight; up to three, for each eight codes and
// row a multiply-add, and two instructions that convert the codes; with many, the multiply-adds:
// twelve to eight loads, and converting the weight, some 40 instructions for eight columns of eight
// weight rows. Measured on Zen 4 at K = 2560, one thread: 19 GB/s with one row from memory; 105
// GFLOP/s with 128 rows, 98 with 32, 71 with 8.
#include "common/x86/float_avx2.h"
#include "int8_weight_linear/tiles.h"

namespace trine {
namespace {

struct Simd {
  static constexpr int64_t kLanes = 8;
  static constexpr int kTileRows = 3;                      // by 4 weight rows: 12 sums
  static constexpr int kPanelRows = 6, kPanelVectors = 2;  // 12 sums, 2 registers of weight

  using Vector = __m256;
  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  static Vector broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static Vector multiply_add_step(Vector a, Vector b, Vector c) { return multiply_add(a, b, c); }
  static float total(Vector v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }

  static Vector load_codes(const int8_t* p) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
  }
  static void convert(const int8_t* const* rows, int64_t k, float* to, int64_t stride) {
    __m256i by_row[4];  // rows i and 4 + i
    for (int i = 0; i < 4; ++i) {
      const auto load = [&](int row) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + k));
      };
      by_row[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(load(i)), load(4 + i), 1);
    }
    const __m256i low01 = _mm256_unpacklo_epi32(by_row[0], by_row[1]);
    const __m256i high01 = _mm256_unpackhi_epi32(by_row[0], by_row[1]);
    const __m256i low23 = _mm256_unpacklo_epi32(by_row[2], by_row[3]);
    const __m256i high23 = _mm256_unpackhi_epi32(by_row[2], by_row[3]);
    // Each lane: four codes of one row.
    const __m256i quads[4] = {
        _mm256_unpacklo_epi64(low01, low23), _mm256_unpackhi_epi64(low01, low23),
        _mm256_unpacklo_epi64(high01, high23), _mm256_unpackhi_epi64(high01, high23)};
    unrolled<16>([&](auto i) {
      const __m256i code = _mm256_slli_epi32(quads[i / 4], 24 - 8 * (i % 4));
      store(to + i * stride, _mm256_cvtepi32_ps(_mm256_srai_epi32(code, 24)));
    });
  }
};

}  // namespace

void int8_weight_widen_avx2(const FloatRows& x, int64_t m, int64_t stride, void* to) {
  widen_row<Simd>(x, m, stride, to);
}

void int8_weight_linear_avx2(const WideRows& x, const GroupedInt8Weight& weight,
                             const LinearOutput& out, const Tile& tile) {
  int8_weight_tile<Simd>(x, weight, out, tile);
}

}  // namespace trine
