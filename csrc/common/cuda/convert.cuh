// The 16-bit floating types of tensors, to and from float: one instruction each.
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

// Round to nearest even.
__device__ __forceinline__ bfloat16 narrow_to_bfloat16(float x) {
  bfloat16 narrowed;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrowed.bits) : "f"(x));
  return narrowed;
}

__device__ __forceinline__ float16 narrow_to_float16(float x) {
  float16 narrowed;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrowed.bits) : "f"(x));
  return narrowed;
}

// Two at once, `low` in the low half.
__device__ __forceinline__ uint32_t narrow_pair_to_bfloat16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ uint32_t narrow_pair_to_float16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

}  // namespace trine
