// What bounds it: the memory of the rows, which nothing but the indices foretells, and writing y.
#include "common/arm/float_neon.h"
#include "int8_embedding/row.h"

namespace trine {
namespace {

struct Simd {
  static constexpr int64_t kLanes = 8;

  static Floats all(float value) { return all_lanes(value); }
  static Floats load_codes(const int8_t* p) {
    const int16x8_t wide = vmovl_s8(vld1_s8(p));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide))};
  }
  static Floats multiply(Floats a, Floats b) {
    return both<Floats>([](float32x4_t x, float32x4_t y) { return vmulq_f32(x, y); }, a, b);
  }
};

}  // namespace

void int8_embedding_neon(const int8_t* codes, float scale, int64_t dim, FloatType type, void* y) {
  embed_row<Simd>(codes, scale, dim, type, y);
}

}  // namespace trine
