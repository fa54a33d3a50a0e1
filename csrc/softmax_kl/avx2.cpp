#include "common/x86/float_avx2.h"
#include "softmax_kl/one_row.h"

namespace trine {
namespace {

struct Vector {
  static constexpr int width = 8;
  static constexpr bool kTables = false;
  __m256 v;

  explicit Vector(__m256 value) : v(value) {}
  explicit Vector(float value) : v(_mm256_set1_ps(value)) {}

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
    return select(_mm256_castsi256_ps(first_lanes(count)), a, b);
  }

  friend Vector operator+(Vector a, Vector b) { return Vector(_mm256_add_ps(a.v, b.v)); }
  friend Vector operator-(Vector a, Vector b) { return Vector(_mm256_sub_ps(a.v, b.v)); }
  friend Vector operator*(Vector a, Vector b) { return Vector(_mm256_mul_ps(a.v, b.v)); }
  friend Vector operator/(Vector a, Vector b) { return Vector(_mm256_div_ps(a.v, b.v)); }
  static Vector mul_add(Vector a, Vector b, Vector c) {
    return Vector(_mm256_fmadd_ps(a.v, b.v, c.v));
  }
  static Vector fused_mul_add(Vector a, Vector b, Vector c) { return mul_add(a, b, c); }
  static Vector max(Vector a, Vector b) { return Vector(_mm256_max_ps(a.v, b.v)); }
  static __m256 greater(Vector a, Vector b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ); }
  static Vector select(__m256 condition, Vector a, Vector b) {
    return Vector(_mm256_blendv_ps(b.v, a.v, condition));
  }
  static Vector copy_sign(Vector size, Vector sign) {
    const __m256 bit = _mm256_set1_ps(-0.0f);
    return Vector(_mm256_or_ps(_mm256_and_ps(bit, sign.v), _mm256_andnot_ps(bit, size.v)));
  }
  static Vector low_bits_to_exponent(Vector x) {
    return Vector(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.v), 23)));
  }
  static std::pair<Vector, Vector> split_exponent(Vector x) {
    const __m256i above =
        _mm256_sub_epi32(_mm256_castps_si256(x.v), _mm256_set1_epi32(kBitsOfSquareRootOfHalf));
    const __m256i exponent = _mm256_and_si256(above, _mm256_set1_epi32(kExponentAndSign));
    return {Vector(_mm256_cvtepi32_ps(exponent)),
            Vector(_mm256_castsi256_ps(_mm256_sub_epi32(_mm256_set1_epi32(kBitsOf1), exponent)))};
  }
  float reduce_add() const {
    return fold([](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
  }
  float reduce_max() const {
    return fold([](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
  }

 private:
  template <class Combine>
  float fold(Combine combine) const {
    const __m128 four = combine(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = combine(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(combine(two, _mm_movehdup_ps(two)));
  }
};

}  // namespace

const SoftmaxKlFunctions kSoftmaxKlAvx2 = Functions<Vector>::all;

}  // namespace trine
