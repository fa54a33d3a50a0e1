// Twin of csrc/common/cuda/convert.cuh.
#pragma once

#include "common/float_types.h"

namespace trine {

template <class T>
float widen_on_device(T x) {
  return widen(x);
}

}  // namespace trine
