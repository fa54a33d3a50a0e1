// Activations of many values in place, on a CPU.
#pragma once

#include "common/activation.h"

namespace trine {
namespace {

// Functions of their own, because the compiler then makes vector instructions of the loops. With
// the option of activation.h, for gcc inlines nothing that was compiled with others.
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#pragma GCC push_options
#pragma GCC optimize("no-trapping-math")
#endif

[[maybe_unused, gnu::noinline]] void relu_all(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = activated(Activation::relu, values[i]);
}
[[maybe_unused, gnu::noinline]] void gelu_all(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = gelu(values[i]);
}
[[maybe_unused, gnu::noinline]] void gelu_tanh_all(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = gelu_tanh(values[i]);
}

#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#pragma GCC pop_options
#endif

[[maybe_unused]] inline void activate_all(Activation activation, float* values, int64_t count) {
  switch (activation) {
    case Activation::relu:
      return relu_all(values, count);
    case Activation::gelu:
      return gelu_all(values, count);
    case Activation::gelu_tanh:
      return gelu_tanh_all(values, count);
    default:
      return;
  }
}

}  // namespace
}  // namespace trine
