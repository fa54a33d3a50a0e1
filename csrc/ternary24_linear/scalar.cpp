#include "common/scratch.h"
#include "common/store.h"
#include "ternary24_linear/ternary24_linear.h"

namespace trine {
namespace {

// Writes whole groups: up to three values beyond k.
void unpack_row(const uint8_t* packed, int64_t k, int8_t* w) {
  uint32_t bits = 0;  // the lowest are the next
  int count = 0;
  for (int64_t i = 0; i < k; i += kTernary24Group) {
    if (count < kTernary24GroupBits) {
      bits |= uint32_t{*packed++} << count;
      count += 8;
    }
    const uint32_t codes = ternary24_codes(bits & 63);
    for (int p = 0; p < kTernary24Group; ++p)
      w[i + p] = static_cast<int8_t>(int(codes >> 2 * p & 3) - 1);
    bits >>= kTernary24GroupBits;
    count -= kTernary24GroupBits;
  }
}

}  // namespace

void ternary24_linear_scalar(const QuantizedRows& x, const Ternary24Weight& weight,
                             const LinearOutput& out, const Tile& tile) {
  const Scratch unpacked(round_up(weight.k, kTernary24Group));
  int8_t* w = unpacked.data<int8_t>();
  for (int64_t n = tile.n_begin; n < tile.n_end; ++n) {
    unpack_row(weight.packed + n * weight.stride, weight.k, w);
    const float weight_scale = weight.scale[weight.per_tensor ? 0 : n];
    for (int64_t m = tile.m_begin; m < tile.m_end; ++m) {
      int32_t acc = 0;
      for (int64_t i = 0; i < weight.k; ++i) acc += int32_t{x.q[m * x.stride + i]} * w[i];
      store(out, m, n, (static_cast<float>(acc) * x.scale[m]) * weight_scale);
    }
  }
}

}  // namespace trine
