// Float values on AVX-512, see float_values.h.
//
// What bounds it: with one row, the reading of the weight, 9/16 of the dense bytes in fp32; up to
// eleven rows, a pick and a multiply-add per row and 16 values; with more, the loads: five for four
// multiply-adds, of which each stands for two of the dense product. Measured on Zen 4 at K = 2560:
// 17 to 20 GB/s with one row from memory; 65% of what the loads allow with 64. bf16 and fp16 values
// are widened, so they save memory but no instructions; see also avx512bf16.cpp.
#include "common/x86/float_avx512.h"
#include "common/x86/transpose.h"
#include "sparse24_linear/float_values.h"

namespace trine {
namespace {

struct Simd {
  static constexpr int64_t kLanes = 16;
  static constexpr int64_t kManyRows = 12;  // measured: below, padding to 16 rows costs more
  static constexpr int kMaxVectors = 4;     // more save few loads, and make slices of x short
  static constexpr int kTileRows = 4, kTileColumns = 4;  // 16 sums and 8 registers of weight

  using Vector = __m512;
  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector broadcast(float value) { return _mm512_set1_ps(value); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

  struct Chunk {
    __m512 values;
    __m512i columns;  // 0 .. 31
  };
  using Sum = __m512;

  template <class T>
  static Chunk load_chunk(const T* values, const uint8_t* indices) {
    const __m512i shift =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i group =
        _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    int32_t bits;
    std::memcpy(&bits, indices, sizeof bits);
    const __m512i positions = _mm512_srlv_epi32(_mm512_set1_epi32(bits), shift);
    constexpr int kAndOr = 0xea;  // (a & b) | c
    return {load_floats(values),
            _mm512_ternarylogic_epi32(positions, _mm512_set1_epi32(3), group, kAndOr)};
  }
  static void multiply_add(Sum& sum, const Chunk& chunk, const float* x) {
    const __m512 picked =
        _mm512_permutex2var_ps(_mm512_loadu_ps(x), chunk.columns, _mm512_loadu_ps(x + 16));
    sum = _mm512_fmadd_ps(chunk.values, picked, sum);
  }
  static float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
};

}  // namespace

int64_t sparse24_block_avx512(int64_t m) { return rows_per_block<Simd>(m); }

void sparse24_widen_avx512(const FloatRows& x, int64_t b, int64_t block, int64_t columns,
                           float* data) {
  widen_block<Simd>(x, b, block, columns, data);
}

void sparse24_float_avx512(const FloatBlocks& x, const Sparse24FloatWeight& weight,
                           const LinearOutput& out, const Tile& tile) {
  sparse24_float_tile<Simd>(x, weight, out, tile);
}

}  // namespace trine
