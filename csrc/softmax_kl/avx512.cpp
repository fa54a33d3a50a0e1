#include "common/x86/float_avx512.h"
#include "softmax_kl/one_row.h"

namespace trine {
namespace {

struct Vector {
  static constexpr int width = 16;
  static constexpr bool kTables = true;
  __m512 v;

  explicit Vector(__m512 value) : v(value) {}
  explicit Vector(float value) : v(_mm512_set1_ps(value)) {}

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
  static Vector first(int count, Vector a, Vector b) { return select(first_lanes(count), a, b); }

  friend Vector operator+(Vector a, Vector b) { return Vector(_mm512_add_ps(a.v, b.v)); }
  friend Vector operator-(Vector a, Vector b) { return Vector(_mm512_sub_ps(a.v, b.v)); }
  friend Vector operator*(Vector a, Vector b) { return Vector(_mm512_mul_ps(a.v, b.v)); }
  friend Vector operator/(Vector a, Vector b) { return Vector(_mm512_div_ps(a.v, b.v)); }
  static Vector mul_add(Vector a, Vector b, Vector c) {
    return Vector(_mm512_fmadd_ps(a.v, b.v, c.v));
  }
  static Vector fused_mul_add(Vector a, Vector b, Vector c) { return mul_add(a, b, c); }
  static Vector max(Vector a, Vector b) { return Vector(_mm512_max_ps(a.v, b.v)); }
  static __mmask16 greater(Vector a, Vector b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
  static Vector select(__mmask16 condition, Vector a, Vector b) {
    return Vector(_mm512_mask_blend_ps(condition, b.v, a.v));
  }
  static Vector copy_sign(Vector size, Vector sign) {
    const __m512i bit = _mm512_set1_epi32(INT32_MIN);
    constexpr int kChoose = 0xca;  // bit ? sign : size
    return Vector(_mm512_castsi512_ps(_mm512_ternarylogic_epi32(
        bit, _mm512_castps_si512(sign.v), _mm512_castps_si512(size.v), kChoose)));
  }
  // By the 4 low bits.
  static Vector look_up(const float (&table)[16], Vector at) {
    return Vector(_mm512_permutexvar_ps(_mm512_castps_si512(at.v), _mm512_load_ps(table)));
  }
  // 2^x of x in sixteenths, whose 4 low bits lie below the exponent's.
  static Vector power_of_sixteenths(Vector shifted) {
    const __m512i bits = _mm512_castps_si512(shifted.v);
    const __m512i mantissa = _mm512_permutexvar_epi32(bits, _mm512_load_si512(kPowersOfSixteenths));
    constexpr int kAndOr = 0xea;  // (a & b) | c
    return Vector(_mm512_castsi512_ps(_mm512_ternarylogic_epi32(
        _mm512_slli_epi32(bits, 23 - 4), _mm512_set1_epi32(kExponentAndSign), mantissa, kAndOr)));
  }
  static Split<Vector> split_sixteenths(Vector x) {
    const __m512i above = _mm512_sub_epi32(_mm512_castps_si512(x.v),
                                           _mm512_set1_epi32(kBitsOf1 - kMantissaOfSixteenth / 2));
    const __m512i exponent = _mm512_and_si512(above, _mm512_set1_epi32(kExponentAndSign));
    const __m512i j = _mm512_srli_epi32(above, 23 - 4);
    const Vector at(_mm512_castsi512_ps(j)), inverse = look_up(kInverses, at);
    return {Vector(_mm512_cvtepi32_ps(exponent)),
            Vector(_mm512_castsi512_ps(_mm512_sub_epi32(_mm512_castps_si512(inverse.v), exponent))),
            look_up(kLogsOfInverses, at)};
  }
  float reduce_add() const { return _mm512_reduce_add_ps(v); }
  float reduce_max() const { return _mm512_reduce_max_ps(v); }
};

}  // namespace

const SoftmaxKlFunctions kSoftmaxKlAvx512 = Functions<Vector, Two<Vector>>::all;

}  // namespace trine
