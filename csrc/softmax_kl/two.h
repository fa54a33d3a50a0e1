// Two vectors as one of twice the width, operation by operation: a chain of dependent operations
// too long for the processor to look past then shares its time with another.
#pragma once

#include <algorithm>
#include <utility>

#include "common/float_types.h"

namespace trine {
namespace {

// What V::split_sixteenths gives; see divergences.h.
template <class V>
struct Split {
  V exponent, inverse, log_inverse;
};

template <class V>
struct Two {
  static constexpr int width = 2 * V::width;
  static constexpr bool kTables = true;
  static_assert(V::kTables);
  V a, b;

  struct Condition {
    decltype(V::greater(V(0.0f), V(0.0f))) a, b;
  };

  Two(V first, V second) : a(first), b(second) {}
  explicit Two(float value) : a(value), b(value) {}

  template <class T>
  static Two load(const T* from, int count) {
    const int beyond = count - V::width;
    return {V::load(from, std::min(count, V::width)),
            beyond > 0 ? V::load(from + V::width, beyond) : V(0.0f)};
  }
  template <class T>
  void store(T* to, int count) const {
    const int beyond = count - V::width;
    a.store(to, std::min(count, V::width));
    if (beyond > 0) b.store(to + V::width, beyond);
  }
  // In that order, which `store_even_odd` undoes.
  static Two load_even_odd(const bfloat16* from) {
    const auto [even, odd] = V::load_even_odd(from);
    return {even, odd};
  }
  void store_even_odd(bfloat16* to) const { V::store_even_odd(a, b, to); }
  static Two first(int count, Two x, Two y) {
    const int beyond = count - V::width;
    return {beyond >= 0 ? x.a : V::first(count, x.a, y.a),
            beyond > 0 ? V::first(beyond, x.b, y.b) : y.b};
  }

  friend Two operator+(Two x, Two y) { return {x.a + y.a, x.b + y.b}; }
  friend Two operator-(Two x, Two y) { return {x.a - y.a, x.b - y.b}; }
  friend Two operator*(Two x, Two y) { return {x.a * y.a, x.b * y.b}; }
  friend Two operator/(Two x, Two y) { return {x.a / y.a, x.b / y.b}; }
  static Two mul_add(Two x, Two y, Two z) {
    return {V::mul_add(x.a, y.a, z.a), V::mul_add(x.b, y.b, z.b)};
  }
  static Two fused_mul_add(Two x, Two y, Two z) {
    return {V::fused_mul_add(x.a, y.a, z.a), V::fused_mul_add(x.b, y.b, z.b)};
  }
  static Two max(Two x, Two y) { return {V::max(x.a, y.a), V::max(x.b, y.b)}; }
  static Condition greater(Two x, Two y) { return {V::greater(x.a, y.a), V::greater(x.b, y.b)}; }
  static Two select(Condition condition, Two x, Two y) {
    return {V::select(condition.a, x.a, y.a), V::select(condition.b, x.b, y.b)};
  }
  static Two copy_sign(Two size, Two sign) {
    return {V::copy_sign(size.a, sign.a), V::copy_sign(size.b, sign.b)};
  }
  static Two look_up(const float (&table)[16], Two at) {
    return {V::look_up(table, at.a), V::look_up(table, at.b)};
  }
  static Two power_of_sixteenths(Two x) {
    return {V::power_of_sixteenths(x.a), V::power_of_sixteenths(x.b)};
  }
  static Split<Two> split_sixteenths(Two x) {
    const Split<V> a = V::split_sixteenths(x.a), b = V::split_sixteenths(x.b);
    return {{a.exponent, b.exponent}, {a.inverse, b.inverse}, {a.log_inverse, b.log_inverse}};
  }
  float reduce_add() const { return (a + b).reduce_add(); }
  float reduce_max() const { return V::max(a, b).reduce_max(); }
};

}  // namespace
}  // namespace trine
