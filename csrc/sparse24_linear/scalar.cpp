#include "common/store.h"
#include "sparse24_linear/sparse24_linear.h"

namespace trine {
namespace {

// Calls visit(v, column) for the v-th stored value of a row.
template <class Visit>
void for_each_value(const uint8_t* indices, int64_t chunks, const Visit& visit) {
  for (int64_t group = 0; group < chunks * kSparse24Columns / 4; ++group) {
    const int nibble = indices[group / 2] >> (group % 2 * 4);
    visit(2 * group, 4 * group + (nibble & 3));
    visit(2 * group + 1, 4 * group + (nibble >> 2 & 3));
  }
}

template <class T>
void widen_row(const T* x, int64_t k, int64_t columns, float* row) {
  for (int64_t i = 0; i < k; ++i) row[i] = widen(x[i]);
  for (int64_t i = k; i < columns; ++i) row[i] = 0.0f;
}

// As many partial sums as a chunk has values: a sum of K / 32 terms loses less than one of K / 2.
template <class T>
float sparse_dot(const float* x, const T* values, const uint8_t* indices, int64_t chunks) {
  float partial[kSparse24Values] = {};
  for_each_value(indices, chunks, [&](int64_t v, int64_t column) {
    float& sum = partial[v % kSparse24Values];
    sum = sum + widen(values[v]) * x[column];
  });
  for (int64_t width = kSparse24Values / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) partial[i] = partial[i] + partial[i + width];
  return partial[0];
}

template <class T>
void run_float(const FloatBlocks& x, const T* values, const uint8_t* indices,
               const LinearOutput& out, const Tile& tile) {
  const int64_t chunks = x.columns / kSparse24Columns;
  for (int64_t n = tile.n_begin; n < tile.n_end; ++n)
    for (int64_t m = tile.m_begin; m < tile.m_end; ++m)
      store(out, m, n,
            sparse_dot(x.data + m * x.columns, values + n * chunks * kSparse24Values,
                       indices + n * chunks * kSparse24Indices, chunks));
}

}  // namespace

int64_t sparse24_block_scalar(int64_t) { return 1; }

void sparse24_widen_scalar(const FloatRows& x, int64_t b, int64_t, int64_t columns, float* data) {
  const char* row = x.data + b * x.row_bytes;
  switch (x.type) {
    case FloatType::float32:
      return widen_row(reinterpret_cast<const float*>(row), x.k, columns, data);
    case FloatType::bfloat16:
      return widen_row(reinterpret_cast<const bfloat16*>(row), x.k, columns, data);
    case FloatType::float16:
      return widen_row(reinterpret_cast<const float16*>(row), x.k, columns, data);
  }
}

void sparse24_float_scalar(const FloatBlocks& x, const Sparse24FloatWeight& weight,
                           const LinearOutput& out, const Tile& tile) {
  switch (weight.type) {
    case FloatType::float32:
      return run_float(x, static_cast<const float*>(weight.values), weight.indices, out, tile);
    case FloatType::bfloat16:
      return run_float(x, static_cast<const bfloat16*>(weight.values), weight.indices, out, tile);
    case FloatType::float16:
      return run_float(x, static_cast<const float16*>(weight.values), weight.indices, out, tile);
  }
}

void sparse24_int8_scalar(const QuantizedRows& x, const Sparse24Int8Weight& weight,
                          const LinearOutput& out, const Tile& tile) {
  for (int64_t n = tile.n_begin; n < tile.n_end; ++n) {
    const int8_t* values = weight.values + n * weight.chunks * kSparse24Values;
    const uint8_t* indices = weight.indices + n * weight.chunks * kSparse24Indices;
    for (int64_t m = tile.m_begin; m < tile.m_end; ++m) {
      const int8_t* q = x.q + m * x.stride;
      int32_t acc = 0;
      for_each_value(indices, weight.chunks,
                     [&](int64_t v, int64_t column) { acc += int32_t{values[v]} * q[column]; });
      store(out, m, n, (static_cast<float>(acc) * x.scale[m]) * weight.scale[n]);
    }
  }
}

}  // namespace trine
