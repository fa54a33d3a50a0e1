// vpdpbusd on 32 codes: see streams.h and lanes.h.
#include "common/x86/gemm_avx2vnni.h"
#include "ternary_linear/few_or_many.h"
#include "ternary_linear/vectors_avx2.h"

namespace trine {
namespace {

struct Simd : Vectors256 {
  using Sums = Int32;
  static constexpr int64_t kDotsPerSum = 0;  // never too many: int32 holds them all

  static Sums dot(Sums sum, Words codes, Words q) {
    return trine::dot(sum, (__m256i)codes, (__m256i)q);
  }
  static Int32 widened(Sums sum) { return sum; }
};

}  // namespace

void ternary_linear_avx2vnni(const QuantizedRows& x, const TernaryWeight& weight,
                             const LinearOutput& out, const Tile& tile) {
  linear_by_simd<Simd>(x, weight, out, tile);
}

}  // namespace trine
