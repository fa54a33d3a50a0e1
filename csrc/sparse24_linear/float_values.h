// What the vector kernels of float values share: both ways to skip the zeros.
//
// Few rows of x: 16 values of a weight row are multiplied by the 16 columns of x that belong to
// them, which are picked from 32 in registers. One pick and one multiplication for 32 columns.
//
// Many rows: lanes are rows of x (FloatBlocks with a block of several vectors). Each value is
// broadcast, and multiplied by the vectors of its column.
//
//   for a block of rows of x
//     for a block of weight rows
//       for a slice of columns (x's slice stays in L1)
//         for each weight row: add_slice       -> fp32 sums [weight row][row of x], in L2
//       write_sums                             -> y
//
// Simd describes the instruction set:
//   kLanes, Vector, zero, load, store, broadcast, add, multiply_add   plain vectors of floats
//   Chunk, load_chunk(values, indices)    16 values and where their columns lie
//   Sum, multiply_add(sum, chunk, x)      sum += values * their columns among x[0] .. x[31]
//   total(sum)
//   kTileRows, kTileColumns               rows of x and of the weight in registers, few rows
//   kManyRows                             from how many on rows of x are many
//   kMaxVectors                           of rows of x in a block, many rows
//   settle(pointer)                       optional: makes gcc compute it, and address from there
// and may lay out x for many rows in another way than column by column:
//   kChunkVectors                         how many vectors a chunk takes then
//   kSliceChunks<vectors>                 chunks of a slice
//   add_slice<vectors>(...)               as the one here, with values as they are
// load_floats, store_floats and transpose8x8 come from the headers of common/x86 or common/arm.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/scratch.h"
#include "common/store.h"
#include "common/unrolled.h"
#include "sparse24_linear/sparse24_linear.h"

namespace trine {
namespace {

// One chunk of columns, of which `count` exist.
template <class Simd, class T>
void widen_chunk(const T* x, int64_t count, float* to) {
  for (int64_t i = 0; i < kSparse24Columns; i += Simd::kLanes) {
    const int64_t left = std::min(count - i, Simd::kLanes);
    Simd::store(to + i, left > 0 ? load_floats(x + i, left) : Simd::zero());
  }
}

template <class Simd>
void widen_block(const FloatRows& x, int64_t b, int64_t block, int64_t columns, float* data) {
  const auto widen_row = [&](int64_t m, int64_t column, float* to) {
    with_type(x.data + m * x.row_bytes, x.type,
              [&](const auto* row) { widen_chunk<Simd>(row + column, x.k - column, to); });
  };
  for (int64_t column = 0; column < columns; column += kSparse24Columns) {
    if (block == 1) {
      widen_row(b, column, data + column);
      continue;
    }
    for (int64_t i = 0; i < block; i += 8) {
      float rows[8][kSparse24Columns] = {};
      for (int64_t m = b * block + i; m < std::min(b * block + i + 8, x.m); ++m)
        widen_row(m, column, rows[m - b * block - i]);
      for (int64_t c = 0; c < kSparse24Columns; c += 8)
        transpose8x8(rows[0] + c, kSparse24Columns, data + (column + c) * block + i, block);
    }
  }
}

// One vector for up to kLanes rows, and so on; more rows than kMaxVectors hold are shared out
// evenly.
template <class Simd>
int64_t rows_per_block(int64_t m) {
  if (m < Simd::kManyRows) return 1;
  const int64_t most = Simd::kMaxVectors * Simd::kLanes;
  const int64_t blocks = (m + most - 1) / most;
  return round_up((m + blocks - 1) / blocks, Simd::kLanes);
}

template <class T>
struct WeightRows {
  const T* values;
  const uint8_t* indices;
  int64_t chunks;  // in a row

  const T* row_values(int64_t n) const { return values + n * chunks * kSparse24Values; }
  const uint8_t* row_indices(int64_t n) const { return indices + n * chunks * kSparse24Indices; }
};

// ---- few rows ----

inline constexpr int kIntoL2 = 2;  // of __builtin_prefetch

template <class Simd, int kRows, int kColumns, class T>
void small_tile(const float* x, const WeightRows<T>& weight, const LinearOutput& out, int64_t m,
                int64_t n) {
  const int64_t columns = weight.chunks * kSparse24Columns;
  typename Simd::Sum sums[kRows][kColumns] = {};
  for (int64_t c = 0; c < weight.chunks; ++c) {
    constexpr int64_t kBytes = kColumns * kSparse24Values * sizeof(T);
    const auto* ahead =
        reinterpret_cast<const char*>(weight.row_values(n)) + kAheadBytes + c * kBytes;
    for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(ahead + line, 0, kIntoL2);
    __builtin_prefetch(weight.row_indices(n) + kAheadBytes / int64_t(4 * sizeof(T)) +
                           c * kColumns * kSparse24Indices,
                       0, kIntoL2);
    typename Simd::Chunk chunk[kColumns];
    for (int j = 0; j < kColumns; ++j)
      chunk[j] = Simd::load_chunk(weight.row_values(n + j) + c * kSparse24Values,
                                  weight.row_indices(n + j) + c * kSparse24Indices);
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kColumns; ++j)
        Simd::multiply_add(sums[i][j], chunk[j], x + (m + i) * columns + c * kSparse24Columns);
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) store(out, m + i, n + j, Simd::total(sums[i][j]));
}

template <class Simd, int kRows, class T>
void small_rows(int64_t rows, const float* x, const WeightRows<T>& weight, const LinearOutput& out,
                int64_t m, int64_t n, int64_t n_end) {
  if constexpr (kRows > 1)
    if (rows < kRows) return small_rows<Simd, kRows - 1>(rows, x, weight, out, m, n, n_end);
  for (; n + Simd::kTileColumns <= n_end; n += Simd::kTileColumns)
    small_tile<Simd, kRows, Simd::kTileColumns>(x, weight, out, m, n);
  for (; n < n_end; ++n) small_tile<Simd, kRows, 1>(x, weight, out, m, n);
}

template <class Simd, class T>
void few_rows(const float* x, const WeightRows<T>& weight, const LinearOutput& out,
              const Tile& tile) {
  constexpr int64_t kColumns = 32;  // weight rows of a K of 2560 then take 160 KiB of L2
  for (int64_t n = tile.n_begin; n < tile.n_end; n += kColumns)
    for (int64_t m = tile.m_begin; m < tile.m_end; m += Simd::kTileRows)
      small_rows<Simd, Simd::kTileRows>(tile.m_end - m, x, weight, out, m, n,
                                        std::min(n + kColumns, tile.n_end));
}

// ---- many rows ----

// A slice of x is read once for each weight row: it stays in an L1 of 32 KiB.
inline constexpr int64_t kSliceBytes = 24 << 10;
// Weight rows whose sums are kept: with 64 rows of x they are 64 KiB.
inline constexpr int64_t kBlockColumns = 256;
// How many weight rows ahead values are fetched: the hardware does not foresee the jump from a
// slice of one row to that of the next. Measured: with two up to twice as fast, with eight 1.4
// times as fast again where a slice of a row takes no longer than 50 cycles (bf16, 8 rows from
// memory).
inline constexpr int64_t kAhead = 8;

[[maybe_unused]] inline const float* as_floats(const float* values, int64_t, float*) {
  return values;
}
template <class T>
const float* as_floats(const T* values, int64_t count, float* widened) {
  constexpr int64_t kLanes = sizeof(load_floats(values)) / sizeof(float);
  for (int64_t i = 0; i < count; i += kLanes) store_floats(load_floats(values + i), widened + i);
  return widened;
}

// sums[i] += values . x, for each of the kVectors * kLanes rows i of a block. `upcoming` are the
// values of a later call.
template <class Simd, int kVectors, class T>
void add_slice(const float* x, const float* values, const uint8_t* indices, int64_t chunks,
               const T* upcoming, float* sums) {
  constexpr int64_t kBlock = kVectors * Simd::kLanes;
  // Eight sums in turn hide the latency of two multiply-adds per cycle.
  constexpr int kTurns = std::max(1, 8 / kVectors);
  typename Simd::Vector acc[kTurns][kVectors];
  for (auto& turn : acc)
    for (auto& sum : turn) sum = Simd::zero();
  for (int64_t c = 0; c < chunks; ++c, x += kSparse24Columns * kBlock, values += kSparse24Values) {
    __builtin_prefetch(upcoming + c * kSparse24Values);
    uint32_t positions;
    std::memcpy(&positions, indices + c * kSparse24Indices, sizeof positions);
    unrolled<kSparse24Values>([&](auto i) __attribute__((always_inline)) {
      const float* column = x + (i / 2 * 4 + (positions >> (2 * i) & 3)) * kBlock;
      if constexpr (requires { Simd::settle(column); }) Simd::settle(column);
      const auto value = Simd::broadcast(values[i]);
      unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
        acc[i % kTurns][v] =
            Simd::multiply_add(value, Simd::load(column + v * Simd::kLanes), acc[i % kTurns][v]);
      });
    });
  }
  for (int v = 0; v < kVectors; ++v) {
    auto sum = acc[0][v];
    for (int turn = 1; turn < kTurns; ++turn) sum = Simd::add(sum, acc[turn][v]);
    float* to = sums + v * Simd::kLanes;
    Simd::store(to, Simd::add(Simd::load(to), sum));
  }
}

// y[m .. m + 7][n .. n_end - 1], where inside of the tile, from sums[column][row].
template <class Simd>
void write_sums(const float* sums, int64_t block, const LinearOutput& out, const Tile& tile,
                int64_t m, int64_t n, int64_t n_end) {
  float rows[8][kBlockColumns];
  for (int64_t column = 0; column < n_end - n; column += 8)
    transpose8x8(sums + column * block, block, rows[0] + column, kBlockColumns);
  with_type(out.y, out.type, [&]<class T>(const T*) {
    for (int64_t row = std::max(m, tile.m_begin); row < std::min(m + 8, tile.m_end); ++row) {
      T* y = static_cast<T*>(out.y) + row * out.stride;
      for (int64_t at = n; at < n_end; at += Simd::kLanes) {
        const int64_t count = std::min(n_end - at, Simd::kLanes);
        auto value = load_floats(rows[row - m] + (at - n), count);
        if (out.bias != nullptr) value = Simd::add(value, load_floats(out.bias + at, count));
        store_floats(value, y + at, count);
      }
    }
  });
}

template <class Simd>
concept LaysOutOtherwise = requires { Simd::kChunkVectors; };

// Vectors and chunks that large_block takes of x.
template <class Simd>
constexpr int64_t chunk_vectors() {
  if constexpr (LaysOutOtherwise<Simd>) return Simd::kChunkVectors;
  return kSparse24Columns;
}
template <class Simd, int kVectors>
constexpr int64_t slice_chunks() {
  if constexpr (LaysOutOtherwise<Simd>) return Simd::template kSliceChunks<kVectors>;
  constexpr int64_t kChunkBytes = kSparse24Columns * kVectors * Simd::kLanes * sizeof(float);
  return std::max<int64_t>(1, kSliceBytes / kChunkBytes);
}

template <class Simd, int kVectors, class T>
void large_block(const float* x, int64_t first_m, const WeightRows<T>& weight,
                 const LinearOutput& out, const Tile& tile) {
  constexpr int64_t kBlock = kVectors * Simd::kLanes;
  constexpr int64_t kSlice = slice_chunks<Simd, kVectors>();
  const Scratch storage(kBlockColumns * kBlock * int64_t(sizeof(float)));
  float* sums = storage.data<float>();
  [[maybe_unused]] alignas(64) float widened[kSlice * kSparse24Values];
  for (int64_t n = tile.n_begin; n < tile.n_end; n += kBlockColumns) {
    const int64_t n_end = std::min(n + kBlockColumns, tile.n_end);
    std::fill_n(sums, round_up(n_end - n, 8) * kBlock, 0.0f);
    for (int64_t chunk = 0; chunk < weight.chunks; chunk += kSlice) {
      const int64_t chunks = std::min(kSlice, weight.chunks - chunk);
      const float* columns = x + chunk * chunk_vectors<Simd>() * kBlock;
      for (int64_t row = n; row < n_end; ++row) {
        const bool wraps = row + kAhead >= n_end;  // into the next slice
        const int64_t later = std::min(row + kAhead - (wraps ? n_end - n : 0), n_end - 1);
        const int64_t later_chunk = chunk + (wraps ? kSlice : 0);
        __builtin_prefetch(weight.row_indices(later) + later_chunk * kSparse24Indices);
        const T* upcoming = weight.row_values(later) + later_chunk * kSparse24Values;
        const T* values = weight.row_values(row) + chunk * kSparse24Values;
        const uint8_t* indices = weight.row_indices(row) + chunk * kSparse24Indices;
        float* to = sums + (row - n) * kBlock;
        if constexpr (LaysOutOtherwise<Simd>)
          Simd::template add_slice<kVectors>(columns, values, indices, chunks, upcoming, to);
        else
          add_slice<Simd, kVectors>(columns, as_floats(values, chunks * kSparse24Values, widened),
                                    indices, chunks, upcoming, to);
      }
    }
    for (int64_t m = std::max(first_m, tile.m_begin / 8 * 8);
         m < std::min(first_m + kBlock, tile.m_end); m += 8)
      write_sums<Simd>(sums + (m - first_m), kBlock, out, tile, m, n, n_end);
  }
}

template <class Simd, int kVectors, class T>
void large_vectors(int64_t vectors, const float* x, int64_t first_m, const WeightRows<T>& weight,
                   const LinearOutput& out, const Tile& tile) {
  if constexpr (kVectors > 1)
    if (vectors < kVectors)
      return large_vectors<Simd, kVectors - 1>(vectors, x, first_m, weight, out, tile);
  large_block<Simd, kVectors>(x, first_m, weight, out, tile);
}

// ---- both ----

template <class Simd>
void sparse24_float_tile(const FloatBlocks& x, const Sparse24FloatWeight& weight,
                         const LinearOutput& out, const Tile& tile) {
  with_type(weight.values, weight.type, [&]<class T>(const T* values) {
    const WeightRows<T> rows{values, weight.indices, x.columns / kSparse24Columns};
    if (x.block == 1) return few_rows<Simd>(x.data, rows, out, tile);
    for (int64_t m = tile.m_begin / x.block * x.block; m < tile.m_end; m += x.block)
      large_vectors<Simd, Simd::kMaxVectors>(x.block / Simd::kLanes, x.data + m * x.columns, m,
                                             rows, out, tile);
  });
}

}  // namespace
}  // namespace trine
