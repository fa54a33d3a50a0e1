// Accesses to global memory: one instruction each, of 1, 2, 4, 8 or 16 bytes. The global address
// must be a multiple of that.
#pragma once

#include "common/cuda/device.cuh"

namespace trine {

// clang-format off
template <int kBytes> struct AccessOf;
template <> struct AccessOf<1>  { using type = uint8_t; };
template <> struct AccessOf<2>  { using type = uint16_t; };
template <> struct AccessOf<4>  { using type = uint32_t; };
template <> struct AccessOf<8>  { using type = uint2; };
template <> struct AccessOf<16> { using type = uint4; };
// clang-format on

template <int kBytes>
__device__ __forceinline__ void load_global(void* registers, const void* global) {
  using Access = typename AccessOf<kBytes>::type;
  *static_cast<Access*>(registers) = *static_cast<const Access*>(global);
}

template <int kBytes>
__device__ __forceinline__ void store_global(void* global, const void* registers) {
  using Access = typename AccessOf<kBytes>::type;
  *static_cast<Access*>(global) = *static_cast<const Access*>(registers);
}

// 16 bytes that this kernel reads once: they leave the L1 to what is read again. Nothing may write
// them while the kernel runs.
__device__ __forceinline__ uint4 load_global_once(const void* global) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(global));
  return value;
}

}  // namespace trine
