// The 16-bit floating types of tensors, widened to float: one instruction each.
#pragma once

#include "common/cuda/device.cuh"
#include "common/float_types.h"

namespace trine {

__device__ __forceinline__ float widen_on_device(bfloat16 x) {
  return __uint_as_float(uint32_t(x.bits) << 16);
}

__device__ __forceinline__ float widen_on_device(float16 x) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
}

}  // namespace trine
