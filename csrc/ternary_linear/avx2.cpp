// vpmaddubsw on 32 codes, whose sums stay in int16 for 64 of them: see streams.h and lanes.h.
#include "common/x86/gemm_avx2.h"
#include "ternary_linear/few_or_many.h"
#include "ternary_linear/vectors_avx2.h"

namespace trine {
namespace {

struct Simd : Vectors256 {
  // Unsigned, so that they may wrap where a damaged weight holds the code 3.
  using Sums = uint16_t __attribute__((vector_size(32)));
  static constexpr int64_t kDotsPerSum = 64;  // pairs of at most 2 * 2 * 127, below 2^15 together

  static Sums dot(Sums sum, Words codes, Words q) {
    sum += (Sums)_mm256_maddubs_epi16((__m256i)codes, (__m256i)q);
    asm("" : "+x"(sum));  // gcc would add up products first, for which it has no registers
    return sum;
  }
  static Int32 widened(Sums sum) {
    return (Int32)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1));
  }
};

}  // namespace

void ternary_linear_avx2(const QuantizedRows& x, const TernaryWeight& weight,
                         const LinearOutput& out, const Tile& tile) {
  linear_by_simd<Simd>(x, weight, out, tile);
}

}  // namespace trine
