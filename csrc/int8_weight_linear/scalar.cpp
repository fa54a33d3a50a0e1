#include "common/store.h"
#include "int8_weight_linear/int8_weight_linear.h"

namespace trine {
namespace {

template <class T>
void widen_row(const T* x, int64_t k, int64_t stride, float* row) {
  for (int64_t i = 0; i < k; ++i) row[i] = widen(x[i]);
  for (int64_t i = k; i < stride; ++i) row[i] = 0.0f;
}

// As many partial sums as a chunk has values: sums of k / 16 terms lose less than one of k.
float dot(const float* x, const int8_t* w, int64_t k) {
  float partial[kInt8WeightChunk] = {};
  for (int64_t i = 0; i < k; ++i) {
    float& sum = partial[i % kInt8WeightChunk];
    sum = sum + x[i] * static_cast<float>(w[i]);
  }
  for (int64_t width = kInt8WeightChunk / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) partial[i] = partial[i] + partial[i + width];
  return partial[0];
}

}  // namespace

void int8_weight_widen_scalar(const FloatRows& x, int64_t m, int64_t stride, void* to) {
  const char* row = x.data + m * x.row_bytes;
  auto* wide = static_cast<float*>(to);
  with_type(row, x.type, [&](const auto* values) { widen_row(values, x.k, stride, wide); });
}

void int8_weight_linear_scalar(const WideRows& x, const GroupedInt8Weight& weight,
                               const LinearOutput& out, const Tile& tile) {
  const int64_t size = weight.group_size();
  for (int64_t n = tile.n_begin; n < tile.n_end; ++n)
    for (int64_t m = tile.m_begin; m < tile.m_end; ++m) {
      const float* row = static_cast<const float*>(x.data) + m * x.stride;
      const int8_t* w = weight.packed + n * weight.stride;
      float sum = 0.0f;
      for (int64_t g = 0; g < weight.groups; ++g)
        sum = sum + weight.scale[n * weight.groups + g] * dot(row + g * size, w + g * size, size);
      store(out, m, n, sum);
    }
}

}  // namespace trine
