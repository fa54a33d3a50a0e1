// What the multi-function unit computes, one instruction each (16 lanes of an SM in a clock).
// Errors as the PTX ISA states them, all without subnormal numbers: these count as 0.
#pragma once

#include "common/cuda/device.cuh"

namespace trine {

// 2^x within 2^-22 of itself.
__device__ __forceinline__ float exp2_approximate(float x) {
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}

// Within 2^-22; between 0.5 and 2 that is an absolute error.
__device__ __forceinline__ float log2_approximate(float x) {
  float value;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}

// 1 / x within 2^-23 of itself.
__device__ __forceinline__ float reciprocal_approximate(float x) {
  float value;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}

}  // namespace trine
