// The four planes of a vector of packed words, and the sums of their products.
//
// Plane i, bits 2i..2i+1 of each byte, is shifted down to be multiplied; or it stays where it lies,
// its codes 4^i times too large, and has a sum of its own. With two sums the shift of planes 2 and
// 3 is one, by 4, and the codes of planes 1 and 3 are 4 times too large.
#pragma once

#include <cstdint>

#include "common/unrolled.h"

namespace trine {
namespace {

template <int kPlaneSums, class Words>
[[gnu::always_inline]] inline Words codes_of_plane(Words words, int plane) {
  const int place = plane % kPlaneSums;
  return words >> 2 * (plane - place) & (0x03030303u << 2 * place);
}

// Of the sums of one row and column; sum(i) is that of each kPlaneSums-th plane from i on.
template <class Simd, int kPlaneSums, class Sum>
[[gnu::always_inline]] inline typename Simd::Int32 add_planes(const Sum& sum) {
  typename Simd::Int32 total = Simd::widened(sum(std::integral_constant<int, 0>{}));
  unrolled<kPlaneSums - 1>([&](auto i) __attribute__((always_inline)) {
    constexpr int plane = i + 1;
    total += Simd::widened(sum(std::integral_constant<int, plane>{})) >> 2 * plane;
  });
  return total;
}

// After how many words of each weight row its sums could become too large; 0 for never.
template <class Simd, int kPlaneSums>
constexpr int64_t words_per_sum() {
  constexpr int64_t kDots = Simd::kDotsPerSum >> 2 * (kPlaneSums - 1), kDotsOfWord = 4 / kPlaneSums;
  static_assert(Simd::kDotsPerSum == 0 || kDots >= kDotsOfWord);
  return kDots / kDotsOfWord;
}

}  // namespace
}  // namespace trine
