#include "softmax_kl/one_row.h"

namespace trine {
namespace {

// One float, with the operations of a vector.
struct Scalar {
  static constexpr int width = 1;
  static constexpr bool kTables = false;
  float v;

  explicit Scalar(float value) : v(value) {}

  template <class T>
  static Scalar load(const T* from, int) {
    return Scalar(widen(*from));
  }
  template <class T>
  void store(T* to, int) const {
    narrow(v, to);
  }
  static Scalar first(int, Scalar a, Scalar) { return a; }

  friend Scalar operator+(Scalar a, Scalar b) { return Scalar(a.v + b.v); }
  friend Scalar operator-(Scalar a, Scalar b) { return Scalar(a.v - b.v); }
  friend Scalar operator*(Scalar a, Scalar b) { return Scalar(a.v * b.v); }
  friend Scalar operator/(Scalar a, Scalar b) { return Scalar(a.v / b.v); }
  static Scalar mul_add(Scalar a, Scalar b, Scalar c) { return Scalar(a.v * b.v + c.v); }
  static Scalar fused_mul_add(Scalar a, Scalar b, Scalar c) {
    return Scalar(float(double(a.v) * b.v + c.v));
  }
  static Scalar max(Scalar a, Scalar b) { return a.v > b.v ? a : b; }  // b where one is NaN
  static bool greater(Scalar a, Scalar b) { return a.v > b.v; }
  static Scalar select(bool condition, Scalar a, Scalar b) { return condition ? a : b; }
  static Scalar copy_sign(Scalar size, Scalar sign) {
    return Scalar(std::copysign(size.v, sign.v));
  }
  static Scalar low_bits_to_exponent(Scalar x) { return Scalar(from_bits(to_bits(x.v) << 23)); }
  static std::pair<Scalar, Scalar> split_exponent(Scalar x) {
    const int32_t exponent = (int32_t(to_bits(x.v)) - kBitsOfSquareRootOfHalf) & kExponentAndSign;
    return {Scalar(float(exponent)), Scalar(from_bits(uint32_t(kBitsOf1 - exponent)))};
  }
  float reduce_add() const { return v; }
  float reduce_max() const { return v; }
};

}  // namespace

const SoftmaxKlFunctions kSoftmaxKlScalar = Functions<Scalar>::all;

}  // namespace trine
