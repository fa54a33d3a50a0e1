#include "common/arm/float_neon.h"
#include "norm_quantize_rows/rows.h"

namespace trine {
namespace {

struct Simd {
  static constexpr int64_t kLanes = 8;

  static Floats all(float value) { return all_lanes(value); }
  static Floats add(Floats a, Floats b) {
    return both<Floats>([](float32x4_t x, float32x4_t y) { return vaddq_f32(x, y); }, a, b);
  }
  static Floats multiply(Floats a, Floats b) {
    return both<Floats>([](float32x4_t x, float32x4_t y) { return vmulq_f32(x, y); }, a, b);
  }
  static void store(Floats v, float* p) { store_floats(v, p); }

  // Lane j: the sum of the values of load(j).
  template <class Load>
  static Floats sum_each(const Load& load) {
    const auto pairs = [&](int64_t j) {
      const Floats v = load(j);
      return vpaddq_f32(v.low, v.high);
    };
    const auto four = [&](int64_t j) {
      const float32x4_t first = vpaddq_f32(pairs(j), pairs(j + 1));
      return vpaddq_f32(first, vpaddq_f32(pairs(j + 2), pairs(j + 3)));
    };
    return {four(0), four(4)};
  }
};

}  // namespace

void norm_row_neon(const void* x, FloatType type, int64_t k, const NormOfRow& norm, void* y) {
  norm_row<Simd>(x, type, k, norm, y);
}

}  // namespace trine
