// Twin of csrc/common/cuda/memory.cuh. Accesses outside a buffer fault on driver.h's guard pages.
#pragma once

#include <cstring>

#include "common/cuda/device.cuh"

namespace trine {

inline void check_aligned(const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0)
    cuda_on_cpu::fail("an access of %d bytes at %p is not aligned to its size", bytes, global);
}

template <int kBytes>
void load_global(void* registers, const void* global) {
  check_aligned(global, kBytes);
  std::memcpy(registers, global, kBytes);
}

template <int kBytes>
void store_global(void* global, const void* registers) {
  check_aligned(global, kBytes);
  std::memcpy(global, registers, kBytes);
}

inline uint4 load_global_once(const void* global) {
  uint4 value;
  load_global<16>(&value, global);
  return value;
}

}  // namespace trine
