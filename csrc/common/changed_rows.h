// The activations of a tile in another form, in which a kernel takes them.
#pragma once

#include "common/linear.h"
#include "common/scratch.h"

namespace trine {
namespace {

// Calls run(rows, out, tile) with the rows of `tile`, numbered from 0, of which change(from, to)
// has rewritten each 64 bytes.
template <class Change, class Run>
void with_changed_rows(const QuantizedRows& x, const LinearOutput& out, const Tile& tile,
                       const Change& change, const Run& run) {
  const int64_t m = tile.m_begin, rows = tile.m_end - m;
  const Scratch storage(rows * x.stride);
  auto* q = storage.data<int8_t>();
  for (int64_t at = 0; at < rows * x.stride; at += 64) change(x.q + m * x.stride + at, q + at);
  const int64_t value_bytes = out.type == FloatType::float32 ? 4 : 2;
  run(QuantizedRows{q, x.stride, x.scale + m, x.sum + m},
      LinearOutput{static_cast<char*>(out.y) + m * out.stride * value_bytes, out.stride, out.type,
                   out.bias},
      Tile{0, rows, tile.n_begin, tile.n_end});
}

}  // namespace
}  // namespace trine
