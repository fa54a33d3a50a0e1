// A loop whose counter is a constant.
#pragma once

#include <type_traits>
#include <utility>

namespace trine {
namespace {

// body(0), body(1), ... body(kCount - 1) with constants: gcc keeps an array in registers only where
// no index into it is a variable when it first looks.
template <int kCount, class Body>
[[gnu::always_inline]] inline void unrolled(const Body& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

}  // namespace
}  // namespace trine
