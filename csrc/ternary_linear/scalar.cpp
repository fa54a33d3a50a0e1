#include "common/scratch.h"
#include "common/store.h"
#include "ternary_linear/ternary_linear.h"

namespace trine {
namespace {

void unpack_row(const uint8_t* packed, int64_t k, int8_t* w) {
  for (int64_t i = 0; i < k; ++i) {
    const int64_t byte = i / kTernaryPerWord * 4 + i % 4;
    const int64_t shift = i % kTernaryPerWord / 4 * 2;
    w[i] = static_cast<int8_t>((packed[byte] >> shift & 3) - 1);
  }
}

int32_t dot(const int8_t* q, const int8_t* w, int64_t k) {
  int32_t acc = 0;
  for (int64_t i = 0; i < k; ++i) acc += int32_t{q[i]} * w[i];
  return acc;
}

}  // namespace

void ternary_linear_scalar(const QuantizedRows& x, const TernaryWeight& weight,
                           const LinearOutput& out, const Tile& tile) {
  const Scratch unpacked(weight.k);
  int8_t* w = unpacked.data<int8_t>();
  const int64_t groups = weight.group_size == 0 ? 0 : weight.k / weight.group_size;
  for (int64_t n = tile.n_begin; n < tile.n_end; ++n) {
    unpack_row(weight.packed + n * weight.stride, weight.k, w);
    for (int64_t m = tile.m_begin; m < tile.m_end; ++m) {
      const int8_t* q = x.q + m * x.stride;
      if (groups == 0) {
        const float acc = static_cast<float>(dot(q, w, weight.k));
        store(out, m, n, (acc * x.scale[m]) * weight.scale[weight.per_tensor ? 0 : n]);
        continue;
      }
      float sum = 0.0f;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t k = g * weight.group_size;
        const float acc = static_cast<float>(dot(q + k, w + k, weight.group_size));
        sum = sum + acc * weight.scale[n * groups + g];
      }
      store(out, m, n, sum * x.scale[m]);
    }
  }
}

}  // namespace trine
