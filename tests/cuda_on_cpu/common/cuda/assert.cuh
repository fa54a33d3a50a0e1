// Twin of csrc/common/cuda/assert.cuh.
#pragma once

#include "common/cuda/device.cuh"

namespace trine {

inline void device_assert(bool condition, const char* message) {
  if (!condition) cuda_on_cpu::fail("a failed assertion on the device: %s", message);
}

}  // namespace trine
