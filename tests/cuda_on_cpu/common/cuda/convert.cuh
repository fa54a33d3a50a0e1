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

inline uint32_t narrow_pair_to_bfloat16(float low, float high) {
  return uint32_t(narrow_to_bfloat16(high).bits) << 16 | narrow_to_bfloat16(low).bits;
}

inline uint32_t narrow_pair_to_float16(float low, float high) {
  return uint32_t(narrow_to_float16(high).bits) << 16 | narrow_to_float16(low).bits;
}

}  // namespace trine
