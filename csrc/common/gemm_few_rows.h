// Few activation rows: vectors along k, of the activations and of the weight.
//
//   for a tile of activation rows
//     for a slice of k (the tile's slice stays in L1)
//       for kTileColumns weight rows: accumulate_tile   -> int32 sums of the tile
//     finish_sums                                       -> y
//
// A Weight has `kOffset` (what its values carry above the true ones), `kMaxTileRows` (the highest
// tile there are registers for), `kRowStep` where a tile must begin at a multiple of so many rows,
// `kStreamedRows` where so many rows, not just one, are faster on four streams of the weight,
// `kFirstSum` where what accumulate_tile adds lacks something of each activation row (q, k): that;
// where it is to be fetched ahead (elements, 64 of a row at a time, are counted from row 0 on)
//   int64_t row_length() const;                       elements from row to row
//   void prefetch(int64_t at, int64_t lines) const;   fetches so many times 64 of them into L2
//   void touch(int64_t at, int64_t count) const;      touches their pages: see pages.h
// and three functions beside it, found by its type:
//   accumulate_tile<rows>(weight, x, n, last_n, k, sums)  sums[i][j] += row i of x . row n+j of w
//   finish_sums(weight, finish, y, y_stride)              scales sums and writes them
//   store_values(finish, values, y, y_stride)             writes as many floats, rows in turn
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "common/activate_all.h"
#include "common/linear.h"
#include "common/pages.h"
#include "common/scratch.h"
#include "common/unrolled.h"

namespace trine {
namespace {

// Weight rows per tile. With six activation rows that makes 24 sums, more than enough independent
// ones to hide the latency of a dot product, and leaves eight zmm registers for operands.
inline constexpr int64_t kTileColumns = 4;
// The activations of a slice of k stay in a 32 KiB L1 beside a tile's weight rows, of which long
// ones may all lie in the same sets. Few rows take no longer slices: as many ternary sums as int32
// holds.
[[maybe_unused]] constexpr int64_t slice_k(int64_t rows, int64_t k) {
  const int64_t bytes = (k <= 3072 ? 24 : 16) << 10;
  return std::clamp<int64_t>(bytes / rows / 64 * 64, 64, 4096);
}
// A block of weight rows takes half of a 1 MiB L2, beside activations and output.
inline constexpr int64_t kBlockBytes = 1 << 19;
inline constexpr int64_t kMaxBlockColumns = 256;

// How many weight rows of k bytes make a block: a multiple of 16.
[[maybe_unused]] inline int64_t block_columns(int64_t k) {
  const int64_t rows = kBlockBytes / std::max<int64_t>(k, 1) / 16 * 16;
  return std::clamp<int64_t>(rows, 16, kMaxBlockColumns);
}

// Consecutive activation rows. Each is zero from the end of k to the next multiple of 64.
struct TileRows {
  const int8_t* q;
  int64_t stride;
  // What the tile fetches of the weight at each 64 of k: so many times 64 elements from here on.
  int64_t fetch_at = 0, fetches = 0;
};

template <class Weight>
concept FetchedAhead = requires(const Weight& weight) { weight.prefetch(weight.row_length(), 1); };

// A part of k; both ends are multiples of 64.
struct Slice {
  int64_t begin, end;
};

// `x` for a tile that takes its columns in `parts` parts, one after the other.
[[maybe_unused]] inline TileRows part_of(const TileRows& x, int64_t part, int64_t parts,
                                         const Slice& k) {
  const int64_t before = x.fetches * part / parts;
  return {x.q, x.stride, x.fetch_at + before * (k.end - k.begin),
          x.fetches * (part + 1) / parts - before};
}

// How sums become outputs.
struct Scaling {
  const float* weight_scale;              // [n] as the output, or one value
  bool per_tensor = false;                // weight_scale is one value
  const int32_t* column_minus = nullptr;  // [n] from tile.n_begin, subtracted from acc; or null
};

// Sums of some rows and columns, and what makes outputs of them; every pointer stands at the first.
struct Finish {
  const int32_t* sums;
  int64_t sums_stride;
  int64_t rows, columns;
  int32_t offset;               // times x_sum, subtracted from the sums of a row
  const int32_t* x_sum;         // [rows]
  const float* x_scale;         // [rows]
  const int32_t* column_minus;  // [columns], or null
  const float* weight_scale;    // [columns], or one value
  bool per_tensor;
  const float* bias;  // [columns], or null
  float least;        // an output below it becomes it: 0 for ReLU, else -infinity

  // `some_rows` rows from i on, `count` columns from n on, a multiple of 16.
  Finish part(int64_t i, int64_t some_rows, int64_t n, int64_t count) const {
    Finish part = *this;
    part.sums += i * sums_stride + n;
    part.rows = some_rows;
    part.columns = count;
    part.x_sum += i;
    part.x_scale += i;
    if (column_minus != nullptr) part.column_minus += n;
    if (!per_tensor) part.weight_scale += n;
    if (bias != nullptr) part.bias += n;
    return part;
  }
};

// visit(first, count) for pieces of [0, total) of at most `most`, shared out evenly: with 6 at most
// 8 are 4 + 4, not 6 + 2. Each piece begins at a multiple of `step`.
template <class Visit>
void for_even_pieces(int64_t total, int64_t most, int64_t step, const Visit& visit) {
  for (int64_t first = 0; first < total;) {
    const int64_t left = total - first, pieces = (left + most - 1) / most;
    const int64_t count = std::min(round_up((left + pieces - 1) / pieces, step), left);
    visit(first, count);
    first += count;
  }
}

template <int kRows, class Weight>
void accumulate_rows(int64_t rows, const Weight& weight, const TileRows& x, int64_t n,
                     int64_t last_n, const Slice& k, int32_t* sums) {
  if (rows == kRows) return accumulate_tile<kRows>(weight, x, n, last_n, k, sums);
  if constexpr (kRows > 1) accumulate_rows<kRows - 1>(rows, weight, x, n, last_n, k, sums);
}

template <class Weight>
constexpr int64_t row_step() {
  if constexpr (requires { Weight::kRowStep; })
    return Weight::kRowStep;
  else
    return 1;
}

// Fetches the weight rows [n_begin, n_end) while as many before them are used: in the order in
// which they lie in memory, whatever the order of use, and with their pages touched in batches.
template <class Weight>
class Ahead {
 public:
  Ahead(const Weight& weight, int64_t n_begin, int64_t n_end)
      : weight_(weight), at_(n_begin * weight.row_length()), end_(n_end * weight.row_length()) {
    weight.touch(at_, end_ - at_);
  }

  // Of what `tiles` tiles of the same weight rows and `count` columns fetch, the part of one.
  void share(int64_t tile, int64_t tiles, int64_t count, TileRows& x) const {
    if (at_ >= end_) return;
    const int64_t before = kTileColumns * tile / tiles;
    x.fetches = kTileColumns * (tile + 1) / tiles - before;
    x.fetch_at = at_ + before * count;
  }

  void pass(int64_t count) { at_ += kTileColumns * count; }

  // All of it, where nothing is used before.
  void fetch_now() {
    for (; at_ < end_; pass(64)) weight_.prefetch(at_, kTileColumns);
  }

 private:
  const Weight& weight_;
  int64_t at_, end_;
};

// What the sums of an activation row begin with.
template <class Products>
int32_t first_sum(const int8_t* q, int64_t k) {
  if constexpr (requires { Products::kFirstSum; })
    return Products::kFirstSum(q, k);
  else
    return 0;
}

// What a tile fetches at the 64 columns that begin `at` columns into its slice.
template <FetchedAhead Weight>
[[gnu::always_inline]] inline void fetch_step(const Weight& weight, const TileRows& x, int64_t at) {
  if (x.fetches > 0) weight.prefetch(x.fetch_at + at * x.fetches, x.fetches);
}

struct NothingAhead {
  void share(int64_t, int64_t, int64_t, TileRows&) const {}
  void pass(int64_t) const {}
};

// Row i of the sums starts at sums + i * kMaxBlockColumns. The offset is still in them, and up to
// kTileColumns - 1 meaningless sums follow the last column. Where there are more rows than a tile
// takes, the tiles share the weight rows while these lie in L1, and the fetching of later ones, so
// that memory is read at an even pace.
template <class Weight, class Fetching = NothingAhead>
void accumulate_block(int64_t rows, const Weight& weight, const TileRows& x, int64_t n_begin,
                      int64_t n_end, int64_t k, int32_t* sums, Fetching ahead = {}) {
  for (int64_t i = 0; i < rows; ++i)
    std::fill_n(sums + i * kMaxBlockColumns, round_up(n_end - n_begin, kTileColumns),
                first_sum<Weight>(x.q + i * x.stride, k));
  constexpr int64_t kMostRows = Weight::kMaxTileRows;
  const int64_t tiles = (rows + kMostRows - 1) / kMostRows;
  for_even_pieces(round_up(k, 64), slice_k(rows, k), 64, [&](int64_t begin, int64_t count) {
    for (int64_t n = n_begin; n < n_end; n += kTileColumns) {
      int64_t tile = 0;
      for_even_pieces(rows, kMostRows, row_step<Weight>(), [&](int64_t first, int64_t tile_rows) {
        TileRows part{x.q + first * x.stride, x.stride};
        ahead.share(tile++, tiles, count, part);
        accumulate_rows<kMostRows>(tile_rows, weight, part, n, n_end - 1, {begin, begin + count},
                                   sums + first * kMaxBlockColumns + (n - n_begin));
      });
      ahead.pass(count);
    }
  });
}

// Products wrap modulo 2^32, as the sums do; the difference is the true sum again.
[[maybe_unused]] inline int32_t wrapping_product(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b));
}

// Writes GELUs of the outputs of `finish` to y. The outputs wait as floats in the L1, many at a
// time: the GELU of one vector is a long chain of instructions, those of many overlap. A function
// of its own, so that its array is no part of the frames of those that need none.
template <class Weight, class T>
[[gnu::noinline]] void finish_gelu(const Weight& weight, const Finish& finish,
                                   Activation activation, T* y, int64_t y_stride) {
  constexpr int64_t kValues = 4 * kMaxBlockColumns;
  alignas(64) float values[kValues];
  for (int64_t n = 0; n < finish.columns; n += kMaxBlockColumns) {
    const int64_t columns = std::min(kMaxBlockColumns, finish.columns - n);
    const int64_t rows = kValues / columns;
    for (int64_t i = 0; i < finish.rows; i += rows) {
      const Finish part = finish.part(i, std::min(rows, finish.rows - i), n, columns);
      finish_sums(weight, part, values, columns);
      activate_all(activation, values, part.rows * columns);
      store_values(part, values, y + i * y_stride + n, y_stride);
    }
  }
}

// Writes the outputs of `finish` to y.
template <class Weight, class T>
void finish_activated(const Weight& weight, const Finish& finish, Activation activation, T* y,
                      int64_t y_stride) {
  if (activation == Activation::gelu || activation == Activation::gelu_tanh)
    finish_gelu(weight, finish, activation, y, y_stride);
  else
    finish_sums(weight, finish, y, y_stride);
}

// Scales the sums of the outputs `piece` and writes them. Each row of sums stands `stride` from the
// one before and is too high by offset * (sum of the activation row) and by column_minus (or null).
template <class Weight>
void finish_rows(const QuantizedRows& x, const Weight& weight, const int32_t* sums, int64_t stride,
                 int32_t offset, const int32_t* column_minus, const Scaling& scaling,
                 const LinearOutput& out, const Tile& piece) {
  const int64_t m = piece.m_begin, n = piece.n_begin;
  const Finish finish{
      sums,
      stride,
      piece.m_end - m,
      piece.n_end - n,
      offset,
      x.sum + m,
      x.scale + m,
      column_minus,
      scaling.per_tensor ? scaling.weight_scale : scaling.weight_scale + n,
      scaling.per_tensor,
      out.bias == nullptr ? nullptr : out.bias + n,
      out.activation == Activation::relu ? 0.0f : -std::numeric_limits<float>::infinity()};
  const int64_t at = m * out.stride + n;
  switch (out.type) {
    case FloatType::float32:
      return finish_activated(weight, finish, out.activation, static_cast<float*>(out.y) + at,
                              out.stride);
    case FloatType::bfloat16:
      return finish_activated(weight, finish, out.activation, static_cast<bfloat16*>(out.y) + at,
                              out.stride);
    case FloatType::float16:
      return finish_activated(weight, finish, out.activation, static_cast<float16*>(out.y) + at,
                              out.stride);
  }
}

// The outputs of one block of weight rows; column_minus stands at its first.
template <class Weight, class Fetching = NothingAhead>
void few_rows_block(const QuantizedRows& x, const Weight& weight, int64_t k,
                    const int32_t* column_minus, const Scaling& scaling, const LinearOutput& out,
                    const Tile& block, const Fetching& ahead = {}) {
  // Two tiles of rows pass together, so that the weight is fetched from memory at an even pace.
  constexpr int64_t kTogether =
      std::max<int64_t>(8, (FetchedAhead<Weight> ? 2 : 1) * Weight::kMaxTileRows);
  alignas(64) int32_t sums[kTogether * kMaxBlockColumns];
  const int64_t rows = block.m_end - block.m_begin;
  for_even_pieces(rows, rows <= kTogether ? kTogether : Weight::kMaxTileRows, row_step<Weight>(),
                  [&](int64_t first, int64_t count) {
                    const int64_t m = block.m_begin + first;
                    const TileRows part{x.q + m * x.stride, x.stride};
                    const auto accumulate = [&](const auto& ahead) {
                      accumulate_block(count, weight, part, block.n_begin, block.n_end, k, sums,
                                       ahead);
                    };
                    if (first == 0)
                      accumulate(ahead);
                    else
                      accumulate(NothingAhead{});
                    finish_rows(x, weight, sums, kMaxBlockColumns, Weight::kOffset, column_minus,
                                scaling, out, {m, m + count, block.n_begin, block.n_end});
                  });
}

template <class Weight>
constexpr int64_t streamed_rows() {
  if constexpr (requires { Weight::kStreamedRows; })
    return Weight::kStreamedRows;
  else
    return 1;
}

// The weight's rows from `first` on in another order: n, n + 1, n + 2 and n + 3 are `stream_rows`
// apart. Four rows that follow one another in memory are many short pieces to the processor's
// prefetchers; so they are four long streams, and nothing has to be prefetched.
template <class Weight>
struct FourStreams : Weight {
  static constexpr int64_t kMaxTileRows = streamed_rows<Weight>();

  int64_t first_row, stream_rows;

  auto row(int64_t n) const { return Weight::row(first_row + n % 4 * stream_rows + n / 4); }
  void prefetch() const;  // hides that of Weight, so that it is not called
};

// Up to streamed_rows() activation rows: bound by the reading of the weight, which no cache has to
// keep. A function of its own: as a part of its caller gcc 12 has no registers left for what its
// loop reads from (2:4 int8, one row from the caches: 1.4 times as long).
template <class Weight>
[[gnu::noinline]] void streamed_linear(const QuantizedRows& x, const Weight& weight, int64_t k,
                                       const Scaling& scaling, const LinearOutput& out,
                                       const Tile& tile) {
  static_assert(kTileColumns == 4);
  constexpr int64_t kMostRows = streamed_rows<Weight>(), kStreamColumns = kMaxBlockColumns / 4;
  const int64_t m = tile.m_begin, rows = tile.m_end - m;
  const int64_t stream_rows = (tile.n_end - tile.n_begin) / 4;
  const FourStreams<Weight> streams{weight, tile.n_begin, stream_rows};
  const auto minus = [&](int64_t n) {
    return scaling.column_minus == nullptr ? nullptr : scaling.column_minus + (n - tile.n_begin);
  };
  alignas(64) int32_t sums[kMostRows * kMaxBlockColumns], ordered[kMostRows * kStreamColumns];
  int64_t piece = kStreamColumns;
  if constexpr (FetchedAhead<Weight>)
    piece = std::clamp<int64_t>(kTouchedBytes / std::max<int64_t>(weight.row_length(), 1) / 16 * 16,
                                16, kStreamColumns);
  for (int64_t i = 0; i < stream_rows; i += piece) {
    const int64_t count = std::min(piece, stream_rows - i);
    // The pages of the next piece of each stream, at first of two; never beyond the weight, for a
    // walk that finds nothing is made again each time.
    if constexpr (FetchedAhead<Weight>)
      for (int64_t stream = 0; stream < 4; ++stream) {
        const int64_t first = i == 0 ? 0 : i + piece, last = std::min(i + 2 * piece, stream_rows);
        weight.touch((tile.n_begin + stream * stream_rows + first) * weight.row_length(),
                     (last - first) * weight.row_length());
      }
    accumulate_block(rows, streams, {x.q + m * x.stride, x.stride}, 4 * i, 4 * (i + count), k,
                     sums);
    for (int64_t stream = 0; stream < 4; ++stream) {
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t j = 0; j < count; ++j)
          ordered[row * kStreamColumns + j] = sums[row * kMaxBlockColumns + 4 * j + stream];
      const int64_t n = tile.n_begin + stream * stream_rows + i;
      finish_rows(x, weight, ordered, kStreamColumns, Weight::kOffset, minus(n), scaling, out,
                  {m, tile.m_end, n, n + count});
    }
  }
  const int64_t n = tile.n_begin + 4 * stream_rows;
  if (n < tile.n_end)
    few_rows_block(x, weight, k, minus(n), scaling, out, {m, tile.m_end, n, tile.n_end});
}

template <class Weight>
void few_rows_linear(const QuantizedRows& x, const Weight& weight, int64_t k,
                     const Scaling& scaling, const LinearOutput& out, const Tile& tile) {
  // Half of a block where the next is fetched meanwhile: the first cannot be.
  const int64_t columns = FetchedAhead<Weight> ? block_columns(2 * k) : block_columns(k);
  for (int64_t n = tile.n_begin; n < tile.n_end; n += columns) {
    const int64_t n_end = std::min(n + columns, tile.n_end);
    const int32_t* minus =
        scaling.column_minus == nullptr ? nullptr : scaling.column_minus + (n - tile.n_begin);
    const Tile block{tile.m_begin, tile.m_end, n, n_end};
    if constexpr (FetchedAhead<Weight>) {
      if (n == tile.n_begin) Ahead(weight, n, n_end).fetch_now();
      few_rows_block(x, weight, k, minus, scaling, out, block,
                     Ahead(weight, n_end, std::min(n_end + columns, tile.n_end)));
    } else {
      few_rows_block(x, weight, k, minus, scaling, out, block);
    }
  }
}

// row_sums[n - n_begin] = the sum of weight row n over k: its product with a row of ones.
template <class Weight>
void sum_weight_rows(const Weight& weight, int64_t k, int64_t n_begin, int64_t n_end,
                     int32_t* row_sums) {
  const Scratch ones(round_up(k, 64));
  std::fill_n(ones.data<int8_t>(), round_up(k, 64), int8_t{0});
  std::fill_n(ones.data<int8_t>(), k, int8_t{1});
  alignas(64) int32_t sums[kMaxBlockColumns];
  for (int64_t n = n_begin; n < n_end; n += kMaxBlockColumns) {
    const int64_t count = std::min(kMaxBlockColumns, n_end - n);
    accumulate_block(1, weight, {ones.data<int8_t>(), 0}, n, n + count, k, sums);
    for (int64_t j = 0; j < count; ++j)
      row_sums[n - n_begin + j] = sums[j] - wrapping_product(Weight::kOffset, int32_t(k));
  }
}

}  // namespace
}  // namespace trine
