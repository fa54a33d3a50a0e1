// What bounds it: memory, where the logits exceed the caches; in them the two exponentials of an
// element, some 14 vector instructions each per 4 elements. Counted, not timed.
#include "common/arm/float_neon.h"
#include "softmax_kl/one_row.h"

namespace trine {
namespace {

struct Vector {
  static constexpr int width = 8;
  static constexpr bool kTables = false;
  Floats v;

  struct Condition {
    uint32x4_t low, high;
  };

  explicit Vector(Floats value) : v(value) {}
  explicit Vector(float value) : v(all_lanes(value)) {}

  template <class T>
  static Vector load(const T* from, int count) {
    return Vector(load_floats(from, count));
  }
  template <class T>
  void store(T* to, int count) const {
    store_floats(v, to, count);
  }
  static std::pair<Vector, Vector> load_even_odd(const bfloat16* from) {
    const auto [even, odd] = trine::load_even_odd(from);
    return {Vector(even), Vector(odd)};
  }
  static void store_even_odd(Vector even, Vector odd, bfloat16* to) {
    trine::store_even_odd({even.v, odd.v}, to);
  }
  // The first `count` lanes of a, the rest of b.
  static Vector first(int count, Vector a, Vector b) {
    float lanes[width];
    b.store(lanes, width);
    a.store(lanes, count);
    return Vector(load_floats(lanes));
  }

  friend Vector operator+(Vector a, Vector b) {
    return map([](float32x4_t x, float32x4_t y) { return vaddq_f32(x, y); }, a, b);
  }
  friend Vector operator-(Vector a, Vector b) {
    return map([](float32x4_t x, float32x4_t y) { return vsubq_f32(x, y); }, a, b);
  }
  friend Vector operator*(Vector a, Vector b) {
    return map([](float32x4_t x, float32x4_t y) { return vmulq_f32(x, y); }, a, b);
  }
  friend Vector operator/(Vector a, Vector b) {
    return map([](float32x4_t x, float32x4_t y) { return vdivq_f32(x, y); }, a, b);
  }
  static Vector mul_add(Vector a, Vector b, Vector c) {
    return map([](float32x4_t x, float32x4_t y, float32x4_t z) { return vfmaq_f32(z, x, y); }, a, b,
               c);
  }
  static Vector fused_mul_add(Vector a, Vector b, Vector c) { return mul_add(a, b, c); }
  // b where one is NaN, as on x86; fmax would give NaN, and fmaxnm the number.
  static Vector max(Vector a, Vector b) { return select(greater(a, b), a, b); }
  static Condition greater(Vector a, Vector b) {
    return both<Condition>([](float32x4_t x, float32x4_t y) { return vcgtq_f32(x, y); }, a.v, b.v);
  }
  static Vector select(Condition condition, Vector a, Vector b) {
    return Vector(both<Floats>(
        [](uint32x4_t which, float32x4_t x, float32x4_t y) { return vbslq_f32(which, x, y); },
        condition, a.v, b.v));
  }
  static Vector copy_sign(Vector size, Vector sign) {
    return map(
        [](float32x4_t x, float32x4_t y) {
          return vbslq_f32(vreinterpretq_u32_f32(vdupq_n_f32(-0.0f)), y, x);
        },
        size, sign);
  }
  static Vector low_bits_to_exponent(Vector x) {
    return map(
        [](float32x4_t y) {
          return vreinterpretq_f32_s32(vshlq_n_s32(vreinterpretq_s32_f32(y), 23));
        },
        x);
  }
  static std::pair<Vector, Vector> split_exponent(Vector x) {
    const auto exponent = [](float32x4_t y) {
      const int32x4_t above =
          vsubq_s32(vreinterpretq_s32_f32(y), vdupq_n_s32(kBitsOfSquareRootOfHalf));
      return vandq_s32(above, vdupq_n_s32(kExponentAndSign));
    };
    return {map([&](float32x4_t y) { return vcvtq_f32_s32(exponent(y)); }, x),
            map(
                [&](float32x4_t y) {
                  return vreinterpretq_f32_s32(vsubq_s32(vdupq_n_s32(kBitsOf1), exponent(y)));
                },
                x)};
  }
  float reduce_add() const { return vaddvq_f32(vaddq_f32(v.low, v.high)); }
  float reduce_max() const { return vmaxvq_f32(vmaxq_f32(v.low, v.high)); }

 private:
  template <class Operation, class... Vectors>
  static Vector map(const Operation& operation, const Vectors&... vectors) {
    return Vector(both<Floats>(operation, vectors.v...));
  }
};

}  // namespace

const SoftmaxKlFunctions kSoftmaxKlNeon = Functions<Vector>::all;

}  // namespace trine
