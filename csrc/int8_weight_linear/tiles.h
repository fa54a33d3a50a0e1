// What the vector kernels share.
//
// Few rows of x: lanes are columns. Codes are converted to fp32 in registers, and multiplied by
// each row. The weight is read once, as four long streams: its rows n, n + 1, n + 2 and n + 3 are a
// quarter of it apart. With one or two rows nothing else counts.
//
// Many rows: lanes are rows of the weight, so that nothing has to be added up at the end and y is
// written in order.
//
//   for kPanelColumns weight rows
//     for a slice of k, inside of one group
//       convert it to a panel        [k][weight row], which stays in L1
//       for kPanelRows rows of x: add_slice   -> totals[row of x][weight row] += scale * sums
//     write_totals                            -> y
//
// Simd describes the instruction set:
//   kLanes, Vector, zero, load, store, broadcast, multiply_add     plain vectors of floats
//   load_codes(p)                     kLanes codes in fp32
//   total(vector)                     the sum of its lanes
//   kTileRows                         of x in registers, few rows; more are many
//   kPanelRows, kPanelVectors         rows of x, and vectors of weight rows, in registers
//   convert(rows, k, to, stride)      16 codes of each of kLanes weight rows, transposed, to
//                                     vectors `stride` floats apart
//   multiply_add_step                 the same of a lane of x, broadcast, and of a panel
//   kStep                             optional: k in such a lane. Two are a pair of bf16, which
//                                     load, store and broadcast take for a float
// load_floats and store_floats come from the headers of common/x86 or common/arm.
#pragma once

#include "common/gemm_many_rows.h"  // for_even_pieces, with_count
#include "common/store.h"
#include "int8_weight_linear/int8_weight_linear.h"

namespace trine {
namespace {

inline constexpr int kIntoL2 = 2;  // of __builtin_prefetch

template <class Simd>
void widen_row(const FloatRows& x, int64_t m, int64_t stride, void* to) {
  auto* wide = static_cast<float*>(to);
  with_type(x.data + m * x.row_bytes, x.type, [&](const auto* row) {
    int64_t i = 0;
    for (; i + Simd::kLanes <= x.k; i += Simd::kLanes) Simd::store(wide + i, load_floats(row + i));
    for (; i < stride; i += Simd::kLanes) {
      const int64_t left = std::min(x.k - i, Simd::kLanes);
      Simd::store(wide + i, left > 0 ? load_floats(row + i, left) : Simd::zero());
    }
  });
}

// ---- few rows ----

// y[tile.m_begin + i][n[j]] for j < columns. Rows n[j] exist, also from `columns` on.
template <class Simd, int kRows>
void few_rows_tile(const WideRows& x, const GroupedInt8Weight& weight, const LinearOutput& out,
                   int64_t m, const int64_t (&n)[4], int columns) {
  using Vector = typename Simd::Vector;
  constexpr int kColumns = 4;
  constexpr int kTurns = kRows == 1 ? 2 : 1;  // eight sums hide the latency of a multiply-add
  const float* rows = static_cast<const float*>(x.data) + m * x.stride;
  const int8_t* codes[kColumns];
  for (int j = 0; j < kColumns; ++j) codes[j] = weight.packed + n[j] * weight.stride;
  Vector totals[kRows][kColumns];
  for (auto& row : totals)
    for (auto& total : row) total = Simd::zero();
  const int64_t size = weight.group_size();
  for (int64_t g = 0; g < weight.groups; ++g) {
    Vector sums[kTurns][kRows][kColumns];
    unrolled<kTurns * kRows * kColumns>([&](auto at) {
      sums[at / (kRows * kColumns)][at / kColumns % kRows][at % kColumns] = Simd::zero();
    });
    const auto add = [&](auto turn, int64_t k) __attribute__((always_inline)) {
      unrolled<kColumns>([&](auto j) __attribute__((always_inline)) {
        const Vector code = Simd::load_codes(codes[j] + k);
        unrolled<kRows>([&](auto i) __attribute__((always_inline)) {
          auto& sum = sums[turn][i][j];
          sum = Simd::multiply_add(code, Simd::load(rows + i * x.stride + k), sum);
        });
      });
    };
    constexpr int64_t kTogether = kTurns * Simd::kLanes;
    const int64_t end = round_up((g + 1) * size, kInt8WeightChunk);
    int64_t k = g * size;
    for (; k + kTogether <= end; k += kTogether)
      unrolled<kTurns>([&](auto turn)
                           __attribute__((always_inline)) { add(turn, k + turn * Simd::kLanes); });
    for (; k < end; k += Simd::kLanes) add(std::integral_constant<int, 0>{}, k);
    unrolled<kColumns>([&](auto j) {
      const Vector scale = Simd::broadcast(weight.scale + n[j] * weight.groups + g);
      unrolled<kRows>([&](auto i) {
        if constexpr (kTurns == 2) sums[0][i][j] = Simd::add(sums[0][i][j], sums[1][i][j]);
        totals[i][j] = Simd::multiply_add(sums[0][i][j], scale, totals[i][j]);
      });
    });
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < columns; ++j) store(out, m + i, n[j], Simd::total(totals[i][j]));
}

template <class Simd>
void few_rows(const WideRows& x, const GroupedInt8Weight& weight, const LinearOutput& out,
              const Tile& tile) {
  const int64_t stream_rows = (tile.n_end - tile.n_begin) / 4;
  const int64_t piece = std::max<int64_t>(1, kTouchedBytes / std::max<int64_t>(weight.stride, 1));
  const auto touch = [&](int64_t first, int64_t last) {
    for (int64_t stream = 0; stream < 4; ++stream)
      touch_pages(weight.packed + (tile.n_begin + stream * stream_rows + first) * weight.stride,
                  (std::min(last, stream_rows) - first) * weight.stride);
  };
  with_count<Simd::kTileRows>(tile.m_end - tile.m_begin, [&](auto rows) {
    const auto run = [&](const int64_t (&n)[4], int columns) {
      few_rows_tile<Simd, rows>(x, weight, out, tile.m_begin, n, columns);
    };
    for (int64_t i = 0; i < stream_rows; ++i) {
      if (i % piece == 0) touch(i == 0 ? 0 : i + piece, i + 2 * piece);
      const int64_t n = tile.n_begin + i;
      run({n, n + stream_rows, n + 2 * stream_rows, n + 3 * stream_rows}, 4);
    }
    const int64_t n = tile.n_begin + 4 * stream_rows, last = tile.n_end - 1;
    if (n <= last)
      run({n, std::min(n + 1, last), std::min(n + 2, last), last}, static_cast<int>(last - n + 1));
  });
}

// ---- many rows ----

template <class Simd>
constexpr int64_t panel_step() {
  if constexpr (requires { Simd::kStep; }) return Simd::kStep;
  return 1;
}
template <class Simd>
inline constexpr int64_t kPanelColumns = Simd::kPanelVectors * Simd::kLanes;
// A slice of k: with 48 columns of fp32 its panel takes 24 KiB of a 32 KiB L1.
inline constexpr int64_t kSliceK = 128;

// totals = scale * sums, or += where it is not the first slice; of kRows rows of x.
template <class Simd, int kRows, int kVectors>
void add_slice(const float* x, int64_t x_stride, const float* panel, int64_t steps,
               const float* scale, bool first, float* totals) {
  using Vector = typename Simd::Vector;
  Vector sums[kRows][kVectors];
  unrolled<kRows * kVectors>([&](auto at) { sums[at / kVectors][at % kVectors] = Simd::zero(); });
  for (int64_t s = 0; s < steps; ++s, panel += kPanelColumns<Simd>) {
    Vector w[kVectors];
    unrolled<kVectors>([&](auto v) { w[v] = Simd::load(panel + v * Simd::kLanes); });
    unrolled<kRows>([&](auto i) __attribute__((always_inline)) {
      const Vector value = Simd::broadcast(x + i * x_stride + s);
      unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
        sums[i][v] = Simd::multiply_add_step(value, w[v], sums[i][v]);
      });
    });
  }
  unrolled<kRows>([&](auto i) {
    unrolled<kVectors>([&](auto v) {
      float* total = totals + i * kPanelColumns<Simd> + v * Simd::kLanes;
      const Vector before = first ? Simd::zero() : Simd::load(total);
      Simd::store(total,
                  Simd::multiply_add(sums[i][v], Simd::load(scale + v * Simd::kLanes), before));
    });
  });
}

// y[tile.m_begin ..][n .. n + count)
template <class Simd>
void write_totals(const float* totals, const LinearOutput& out, const Tile& tile, int64_t n,
                  int64_t count) {
  with_type(out.y, out.type, [&]<class T>(const T*) {
    for (int64_t m = tile.m_begin; m < tile.m_end; ++m, totals += kPanelColumns<Simd>) {
      T* y = static_cast<T*>(out.y) + m * out.stride + n;
      for (int64_t at = 0; at < count; at += Simd::kLanes) {
        const int64_t lanes = std::min(count - at, Simd::kLanes);
        auto value = load_floats(totals + at);
        if (out.bias != nullptr) value = Simd::add(value, load_floats(out.bias + n + at, lanes));
        store_floats(value, y + at, lanes);
      }
    }
  });
}

// The panel of columns [k, k + count) of the weight rows [n, n_end); rows past the last are it
// again. Fetches meanwhile as many codes from `later` on.
template <class Simd>
void convert_panel(const GroupedInt8Weight& weight, int64_t n, int64_t n_end, int64_t k,
                   int64_t count, const int8_t* later, float* panel) {
  constexpr int64_t kStep = panel_step<Simd>(), kCodes = kInt8WeightChunk * Simd::kLanes;
  for (int64_t v = 0; v * Simd::kLanes < n_end - n; ++v) {
    const int8_t* rows[Simd::kLanes];
    for (int64_t lane = 0; lane < Simd::kLanes; ++lane)
      rows[lane] =
          weight.packed + std::min(n + v * Simd::kLanes + lane, n_end - 1) * weight.stride + k;
    for (int64_t at = 0; at < count; at += kInt8WeightChunk, later += kCodes) {
      for (int64_t line = 0; line < kCodes; line += 64)
        __builtin_prefetch(later + line, 0, kIntoL2);
      Simd::convert(rows, at, panel + at / kStep * kPanelColumns<Simd> + v * Simd::kLanes,
                    kPanelColumns<Simd>);
    }
  }
}

template <class Simd>
void many_rows(const WideRows& x, const GroupedInt8Weight& weight, const LinearOutput& out,
               const Tile& tile) {
  constexpr int64_t kColumns = kPanelColumns<Simd>, kStep = panel_step<Simd>();
  const int64_t rows = tile.m_end - tile.m_begin, size = weight.group_size();
  const Scratch storage((kSliceK / kStep + rows) * kColumns * int64_t(sizeof(float)));
  float *panel = storage.data<float>(), *totals = panel + kSliceK / kStep * kColumns;
  alignas(64) float scale[kColumns];
  if (weight.k == 0) std::fill_n(totals, rows * kColumns, 0.0f);  // there is no slice
  for (int64_t n = tile.n_begin; n < tile.n_end; n += kColumns) {
    const int64_t n_end = std::min(n + kColumns, tile.n_end);
    // The next panel is fetched in the order of memory while this one is used, its pages at once.
    const int8_t* later = weight.packed + std::min(n_end, tile.n_end - 1) * weight.stride;
    touch_pages(later, (std::min(n_end + kColumns, tile.n_end) - n_end) * weight.stride);
    for (int64_t g = 0; g < weight.groups; ++g) {
      for (int64_t j = 0; j < kColumns; ++j)
        scale[j] = weight.scale[std::min(n + j, n_end - 1) * weight.groups + g];
      for_even_pieces(
          round_up(size, kInt8WeightChunk), kSliceK, kInt8WeightChunk,
          [&](int64_t begin, int64_t count) {
            const int64_t k = g * size + begin;
            convert_panel<Simd>(weight, n, n_end, k, count, later, panel);
            if (n_end < tile.n_end) later += kColumns * count;
            // In floats: pairs of bf16 are one.
            const float* slice = static_cast<const float*>(x.data) + k / kStep;
            const int64_t stride = x.stride / kStep;
            for_even_pieces(rows, Simd::kPanelRows, 1, [&](int64_t i, int64_t tile_rows) {
              with_count<Simd::kPanelVectors>(
                  (n_end - n + Simd::kLanes - 1) / Simd::kLanes, [&](auto vectors) {
                    with_count<Simd::kPanelRows>(tile_rows, [&](auto kRows) {
                      add_slice<Simd, kRows, vectors>(slice + (tile.m_begin + i) * stride, stride,
                                                      panel, count / kStep, scale, k == 0,
                                                      totals + i * kColumns);
                    });
                  });
            });
          });
    }
    write_totals<Simd>(totals, out, tile, n, n_end - n);
  }
}

// ---- both ----

template <class Simd>
void int8_weight_tile(const WideRows& x, const GroupedInt8Weight& weight, const LinearOutput& out,
                      const Tile& tile) {
  if (x.m <= Simd::kTileRows) return few_rows<Simd>(x, weight, out, tile);
  many_rows<Simd>(x, weight, out, tile);
}

}  // namespace
}  // namespace trine
