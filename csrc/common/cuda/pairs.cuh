// Arithmetic on two 16-bit floats in a register, one instruction each, rounded once.
#pragma once

#include "common/cuda/device.cuh"

namespace trine {

// a - b
__device__ __forceinline__ uint32_t subtract_pair_float16(uint32_t a, uint32_t b) {
  uint32_t pair;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}

// a * b + c
__device__ __forceinline__ uint32_t multiply_add_pair_bfloat16(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t pair;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
  return pair;
}

}  // namespace trine
