// Twin of csrc/common/cuda/cluster_memory.cuh.
#pragma once

#include <cstring>

#include "common/cuda/device.cuh"
#include "emulator.h"
#include "shared_memory.h"

namespace trine {

template <class T>
T remote_value(const T* own, uint32_t rank) {
  static_assert(sizeof(T) % 8 == 0 && alignof(T) == 8);
  const auto address = cuda_on_cpu::address_in_block(shared_address(own), rank);
  const void* there = cuda_on_cpu::at_shared(cuda_on_cpu::View::threads, 0, address, sizeof(T), 8,
                                             "a read from another block");
  if (cuda_on_cpu::has_returned(rank))
    cuda_on_cpu::fail("a read from the shared memory of block %u, which has returned", rank);
  T value;
  std::memcpy(&value, there, sizeof(T));
  return value;
}

}  // namespace trine
