// Twin of csrc/common/cuda/convert.cuh.
#pragma once

#include "common/float_types.h"

namespace trine {

template <class T>
float widen_on_device(T x) {
  return widen(x);
}

inline bfloat16 narrow_to_bfloat16(float x) {
  bfloat16 narrowed;
  narrow(x, &narrowed);
  return narrowed;
}

inline float16 narrow_to_float16(float x) {
  float16 narrowed;
  narrow(x, &narrowed);
  return narrowed;
}

}  // namespace trine
