// Groups along k for the vector kernels: the integer tiles run group by group, and their sums are
// scaled into float sums. Only Arm's kernels still use it, through codes_arm.h; those of x86 take
// lanes.h. The loops over kGroupColumns become vector instructions.
//
// What bounds it: starting and finishing tiles, once per group.
#pragma once

#include <algorithm>

#include "common/gemm_blocking.h"
#include "ternary_linear/groups.h"

namespace trine {
namespace {

// Columns whose float sums are kept at a time: a zmm register and a cache line of output.
inline constexpr int64_t kGroupColumns = 16;

// Groups whose sums are taken before any is scaled: as many as accumulate_block has room for. Sums
// are written four at a time and read 16 at a time, which must not follow on each other at once.
inline constexpr int64_t kGroupsAtATime = kMaxBlockColumns / kGroupColumns;

// A Weight is made of its packed rows, their stride, and how far ahead to prefetch.
template <class Weight>
void grouped_linear(const QuantizedRows& x, const TernaryWeight& weight, const LinearOutput& out,
                    const Tile& tile) {
  const int64_t groups = weight.k / weight.group_size;
  const int64_t rows_in_tile = tile.m_end - tile.m_begin;
  const Scratch x_sums(rows_in_tile * groups * int64_t(sizeof(int32_t)));
  sum_groups(x, weight.group_size, groups, tile, x_sums.data<int32_t>());
  const Scratch transposed(groups * kGroupColumns * int64_t(sizeof(float)));
  float* scale = transposed.data<float>();  // [g][kGroupColumns]
  alignas(64) int32_t sums[Weight::kMaxTileRows * kMaxBlockColumns] = {};

  for (int64_t n = tile.n_begin; n < tile.n_end; n += kGroupColumns) {
    const int64_t count = std::min(kGroupColumns, tile.n_end - n);
    for (int64_t j = 0; j < kGroupColumns; ++j)  // columns beyond the last repeat it
      for (int64_t g = 0; g < groups; ++g)
        scale[g * kGroupColumns + j] = weight.scale[(n + std::min(j, count - 1)) * groups + g];

    for (int64_t m = tile.m_begin; m < tile.m_end; m += Weight::kMaxTileRows) {
      const int64_t rows = std::min(Weight::kMaxTileRows, tile.m_end - m);
      alignas(64) float totals[Weight::kMaxTileRows][kGroupColumns] = {};
      for (int64_t first = 0; first < groups; first += kGroupsAtATime) {
        const int64_t last = std::min(first + kGroupsAtATime, groups);
        for (int64_t g = first; g < last; ++g) {
          const int64_t k = g * weight.group_size;
          const Weight group{weight.packed + k / kTernaryPerByte, weight.stride,
                             kGroupColumns * weight.stride};
          accumulate_block(rows, group, {x.q + m * x.stride + k, x.stride}, n, n + count,
                           weight.group_size, sums + (g - first) * kGroupColumns);
        }
        for (int64_t i = 0; i < rows; ++i) {
          const int32_t* minus = x_sums.data<int32_t>() + (m - tile.m_begin + i) * groups;
          const int32_t* row_sums = sums + i * kMaxBlockColumns;
          for (int64_t g = first; g < last; ++g, row_sums += kGroupColumns)
            for (int64_t j = 0; j < kGroupColumns; ++j)
              totals[i][j] +=
                  static_cast<float>(row_sums[j] - minus[g]) * scale[g * kGroupColumns + j];
        }
      }
      for (int64_t i = 0; i < rows; ++i)
        finish_groups(totals[i], x.scale[m + i], out, m + i, n, count);
    }
  }
}

}  // namespace
}  // namespace trine
