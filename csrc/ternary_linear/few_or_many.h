// Which of the ways of computing on x86 serves a tile.
#pragma once

#include "ternary_linear/grouped_streams.h"
#include "ternary_linear/lanes.h"
#include "ternary_linear/streams.h"

namespace trine {
namespace {

// Two rows are 1.1 to 1.4 times as fast in streams from memory; from the caches as fast with
// AVX-512, 0.8 to 0.9 times with AVX2.
inline constexpr int64_t kFewGroupedRows = 2;

template <class Simd>
void linear_by_simd(const QuantizedRows& x, const TernaryWeight& weight, const LinearOutput& out,
                    const Tile& tile) {
  const int64_t rows = tile.m_end - tile.m_begin;
  // At the end of a weight row the streams add up lanes for each row of x: it must be long enough.
  const bool long_enough = rows * Simd::kLanes <= 2 * weight.stride / 4;
  if (weight.group_size == 0 && rows <= Simd::kFewRows && long_enough)
    linear_by_streams<Simd>(x, weight, out, tile);
  else if (weight.group_size > 0 && rows <= kFewGroupedRows)
    grouped_by_streams<Simd>(x, weight, out, tile);
  else
    linear_by_lanes<Simd>(x, weight, out, tile);
}

}  // namespace
}  // namespace trine
