// Many activation rows: vectors across the rows, where gemm_few_rows.h has vectors along k. The
// activations are laid out anew, once per Tile: a vector holds kGroup consecutive k of each of
// kLanes rows. A group of a weight row is broadcast from where it lies. So every lane is a sum of
// its own: nothing is added up at the end of a row, and no byte of the weight is prepared.
//
//   for a block of weight rows (they stay in L2)
//     for up to kMaxVectors vectors of activation rows
//       for a slice of k, for kColumns weight rows: accumulate  -> int32 sums
//       finish_rows                                                 -> y
//
// A Weight takes part by naming `ManyRows`, the traits of its instruction set, and kManyRows, from
// how many rows on this is the faster way. Its rows are read as int8 from where row(n) points,
// `stride` bytes apart. ManyRows has
//   kLanes, kGroup, kMaxVectors  as above
//   kLastRows                    up to so many rows beyond whole vectors pass as few rows
//   kGroupBytes                  that a group takes in an interleaved vector
//   kColumns, kSliceK            weight rows and k of a tile
//   kFirstSum(q, k)              what the sums of an activation row begin with; only where not 0
//   kOffset                      what interleaved activations carry above the true ones
//   interleave(q, stride, rows, groups, to, to_stride)
//                                writes a vector for each group of `rows` rows; other lanes may
//                                hold anything
//   accumulate<vectors>(w, ahead, x, groups, first, sums)
//                                sums[i * kManySums + j] += row i of x . row j of w, or = where it
//                                is the first; may prefetch the weight `ahead` bytes further on
//   sum_rows(w, groups, sums)    sums[j] += the sum of row j of w; only where kOffset is not 0
#pragma once

#include <optional>

#include "common/gemm_few_rows.h"

namespace trine {
namespace {

// From the sums of one activation row to those of the next. A multiple of 1 KiB would put all of
// them into the same few sets of the L1.
inline constexpr int64_t kManySums = kMaxBlockColumns + 16;

// How many columns are finished at once, where one slice holds all of k: their sums stay in L1.
inline constexpr int64_t kFinishedTogether = 16;

// body(std::integral_constant<int, count>{}) for a count in [1, kMax].
template <int kMax, class Body>
void with_count(int64_t count, const Body& body) {
  if (count == kMax) return body(std::integral_constant<int, kMax>{});
  if constexpr (kMax > 1) with_count<kMax - 1>(count, body);
}

// Activation rows [m_begin, m_end) in vectors, as tiles of up to kMaxVectors read them.
template <class Vectors>
class InterleavedRows {
 public:
  InterleavedRows(const QuantizedRows& x, int64_t m_begin, int64_t m_end, int64_t k)
      : groups_((k + Vectors::kGroup - 1) / Vectors::kGroup),
        m_begin_(m_begin),
        m_end_(m_end),
        storage_(vectors() * groups_ * kVectorBytes) {
    for_tiles([&](int64_t first, int64_t count) {
      for (int64_t v = first; v < first + count; ++v) {
        const int64_t m = m_begin + v * Vectors::kLanes;
        Vectors::interleave(x.q + m * x.stride, x.stride, std::min(m_end - m, Vectors::kLanes),
                            groups_, tile(first, count, 0) + (v - first) * kVectorBytes,
                            count * kVectorBytes);
      }
    });
  }

  // visit(first vector, number of vectors)
  template <class Visit>
  void for_tiles(const Visit& visit) const {
    for_even_pieces(vectors(), Vectors::kMaxVectors, 1, visit);
  }

  char* tile(int64_t first, int64_t count, int64_t group) const {
    return storage_.data<char>() + (first * groups_ + group * count) * kVectorBytes;
  }

  int64_t groups() const { return groups_; }

 private:
  static constexpr int64_t kVectorBytes = Vectors::kGroupBytes;

  int64_t vectors() const { return (m_end_ - m_begin_ + Vectors::kLanes - 1) / Vectors::kLanes; }

  int64_t groups_, m_begin_, m_end_;
  Scratch storage_;
};

template <class Weight>
void many_rows_linear(const QuantizedRows& x, const Weight& weight, int64_t k,
                      const Scaling& scaling, const LinearOutput& out, const Tile& tile) {
  using Vectors = typename Weight::ManyRows;
  const int64_t last = (tile.m_end - tile.m_begin) % Vectors::kLanes;
  const int64_t m_many = last > Vectors::kLastRows ? tile.m_end : tile.m_end - last;
  const InterleavedRows<Vectors> activations(x, tile.m_begin, m_many, k);

  constexpr int64_t kSliceGroups = Vectors::kSliceK / Vectors::kGroup;
  const int64_t columns = block_columns(k);
  const int64_t together = activations.groups() <= kSliceGroups ? kFinishedTogether : columns;
  alignas(64) int32_t sums[Vectors::kMaxVectors * Vectors::kLanes * kManySums];
  alignas(64) int32_t weight_sums[kMaxBlockColumns];
  constexpr bool kPrefilled = requires { Vectors::kFirstSum; };
  std::optional<Scratch> first_sums;  // of each row
  if constexpr (kPrefilled) {
    first_sums.emplace((m_many - tile.m_begin) * int64_t(sizeof(int32_t)));
    for (int64_t m = tile.m_begin; m < m_many; ++m)
      first_sums->data<int32_t>()[m - tile.m_begin] = first_sum<Vectors>(x.q + m * x.stride, k);
  }
  constexpr bool kSumWeight = Vectors::kOffset != 0;
  for (int64_t n = tile.n_begin; n < tile.n_end; n += columns) {
    const int64_t n_end = std::min(n + columns, tile.n_end);
    if constexpr (FetchedAhead<Weight>)  // what the tiles prefetch in the next block
      weight.touch(n_end * weight.row_length(),
                   std::min(columns, tile.n_end - n_end) * weight.row_length());
    const int32_t* given =
        scaling.column_minus == nullptr ? nullptr : scaling.column_minus + (n - tile.n_begin);
    std::fill_n(weight_sums, kMaxBlockColumns, 0);
    activations.for_tiles([&](int64_t first, int64_t count) {
      const int64_t m = tile.m_begin + first * Vectors::kLanes;
      const int64_t m_end = std::min(m + count * Vectors::kLanes, m_many);
      for (int64_t begin = n; begin < n_end; begin += together) {
        const int64_t end = std::min(begin + together, n_end);
        if constexpr (kPrefilled)
          for (int64_t i = m; i < m_end; ++i)
            std::fill_n(sums + (i - m) * kManySums, round_up(end - begin, Vectors::kColumns),
                        first_sums->data<int32_t>()[i - tile.m_begin]);
        int64_t group = 0;
        do {  // once even if k is 0
          const int64_t groups = std::min(kSliceGroups, activations.groups() - group);
          for (int64_t j = begin; j < end; j += Vectors::kColumns) {
            const int8_t* w[Vectors::kColumns];
            for (int64_t c = 0; c < Vectors::kColumns;
                 ++c)  // beyond the last: that again, never read
              w[c] = weight.row(std::min(j + c, n_end - 1)) + group * Vectors::kGroup;
            if constexpr (kSumWeight)
              if (first == 0) Vectors::sum_rows(w, groups, weight_sums + (j - n));
            with_count<Vectors::kMaxVectors>(count, [&](auto vectors) {
              Vectors::template accumulate<vectors>(w, Vectors::kColumns * weight.stride,
                                                    activations.tile(first, count, group), groups,
                                                    group == 0 && !kPrefilled, sums + (j - begin));
            });
          }
          group += kSliceGroups;
        } while (group < activations.groups());
        if (kSumWeight && first == 0)  // now what is to be subtracted
          for (int64_t j = begin - n; j < end - n; ++j)
            weight_sums[j] = wrapping_product(Vectors::kOffset, weight_sums[j]) +
                             (given == nullptr ? 0 : given[j]);
        const int32_t* minus = kSumWeight ? weight_sums : given;
        if (minus != nullptr) minus += begin - n;
        finish_rows(x, weight, sums, kManySums, 0, minus, scaling, out, {m, m_end, begin, end});
      }
    });
    if (m_many < tile.m_end)
      few_rows_block(x, weight, k, given, scaling, out, {m_many, tile.m_end, n, n_end});
  }
}

}  // namespace
}  // namespace trine
