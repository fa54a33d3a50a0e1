// Float values on AVX2, see float_values.h; and int8 values, see int8_picks_avx2.h and
// int8_lanes_avx2.h.
//
// What bounds float values: with few rows, the six instructions that pick and multiply eight
// columns of x; with many, the loads, nine for eight multiply-adds.
#include "common/x86/gemm_avx2.h"
#include "common/x86/transpose.h"
#include "sparse24_linear/float_values.h"
#include "sparse24_linear/int8_lanes_avx2.h"
#include "sparse24_linear/int8_picks_avx2.h"

namespace trine {
namespace {

// Up to so many rows of x they are taken by picks; of more, up to so many beyond whole vectors.
// Measured on Zen 3: a fourth would take as long as the vector that it does not fill.
constexpr int64_t kFewInt8Rows = 8, kLastInt8Rows = 3;

struct Simd {
  static constexpr int64_t kLanes = 8;
  static constexpr int64_t kManyRows = 5;  // measured: below, padding to 8 rows costs more
  static constexpr int kMaxVectors = 8;    // eight sums hide the latency of a multiply-add
  static constexpr int kTileRows = 2, kTileColumns = 2;  // 8 registers of sums, 8 of weight

  using Vector = __m256;
  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  static Vector broadcast(float value) { return _mm256_set1_ps(value); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

  // Four groups, 16 columns, at a time. A 128-bit lane of a vector of x is one group, and
  // vpermilps picks inside of lanes: lane 0 of a half holds groups 0 and 2, lane 1 groups 1 and 3.
  struct Chunk {
    __m256 values[2];
    __m256i positions[2];  // in the low two bits, all that vpermilps looks at
  };
  struct Sum {
    __m256 half[2];
  };

  template <class T>
  static Chunk load_chunk(const T* values, const uint8_t* indices) {
    const __m256i shift = _mm256_setr_epi32(0, 2, 8, 10, 4, 6, 12, 14);
    int32_t bits;
    std::memcpy(&bits, indices, sizeof bits);
    const __m256i words = _mm256_set1_epi32(bits);
    return {{by_lanes(load_floats(values)), by_lanes(load_floats(values + 8))},
            {_mm256_srlv_epi32(words, shift),
             _mm256_srlv_epi32(words, _mm256_add_epi32(shift, _mm256_set1_epi32(16)))}};
  }
  static void multiply_add(Sum& sum, const Chunk& chunk, const float* x) {
    for (int i = 0; i < 2; ++i) {
      const __m256i positions = chunk.positions[i];
      const __m256 groups01 = _mm256_permutevar_ps(_mm256_loadu_ps(x + 16 * i), positions);
      const __m256 groups23 = _mm256_permutevar_ps(_mm256_loadu_ps(x + 16 * i + 8), positions);
      sum.half[i] =
          _mm256_fmadd_ps(chunk.values[i], _mm256_blend_ps(groups01, groups23, 0xcc), sum.half[i]);
    }
  }
  static float total(const Sum& sum) {
    const __m256 both = _mm256_add_ps(sum.half[0], sum.half[1]);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }

 private:
  // The pairs of groups 0, 1, 2, 3 in the order 0, 2, 1, 3.
  static __m256 by_lanes(__m256 values) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(values), 0xd8));
  }
};

}  // namespace

int64_t sparse24_block_avx2(int64_t m) { return rows_per_block<Simd>(m); }

void sparse24_widen_avx2(const FloatRows& x, int64_t b, int64_t block, int64_t columns,
                         float* data) {
  widen_block<Simd>(x, b, block, columns, data);
}

void sparse24_float_avx2(const FloatBlocks& x, const Sparse24FloatWeight& weight,
                         const LinearOutput& out, const Tile& tile) {
  sparse24_float_tile<Simd>(x, weight, out, tile);
}

void sparse24_int8_avx2(const QuantizedRows& x, const Sparse24Int8Weight& weight,
                        const LinearOutput& out, const Tile& tile) {
  const int64_t rows = tile.m_end - tile.m_begin, last = rows % kLaneRows;
  Tile lanes = tile, picks = tile;
  lanes.m_end = picks.m_begin =
      rows <= kFewInt8Rows ? tile.m_begin : tile.m_end - (last <= kLastInt8Rows ? last : 0);
  if (lanes.m_begin < lanes.m_end) linear_by_lanes(x, weight, out, lanes);
  if (picks.m_begin < picks.m_end) linear_by_picks(x, weight, out, picks);
}

}  // namespace trine
