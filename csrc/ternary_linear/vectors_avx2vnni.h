// The ternary kernels' vectors with AVX2-VNNI.
#pragma once

#include "common/x86/gemm_avx2vnni.h"
#include "ternary_linear/vectors_avx2.h"

namespace trine {
namespace {

struct VnniVectors256 : Vectors256 {
  // More than with AVX2: two rows take as long to decode, but half as long to multiply. At 3 to 8
  // rows 1.05 to 1.3 times as fast as by lanes.
  static constexpr int64_t kFewRows = 8;
  static constexpr int kPlaneSums = 1;
  using Sums = Int32;
  static constexpr int64_t kDotsPerSum = 0;  // never too many: int32 holds them all

  static Sums dot(Sums sum, Words codes, Words q) {
    return trine::dot(sum, (__m256i)codes, (__m256i)q);
  }
  static Int32 widened(Sums sum) { return sum; }
};

}  // namespace
}  // namespace trine
