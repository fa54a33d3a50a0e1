// Reads from the shared memory of the cluster's other blocks (sm_90).
#pragma once

#include "common/cuda/device.cuh"

namespace trine {

// What block `rank` of the cluster has where this one has the 8 bytes at `address`. That block must
// have written them before a barrier of the cluster, and return only behind one that comes after.
__device__ __forceinline__ uint64_t load_remote(SharedAddress address, uint32_t rank) {
  uint64_t value;
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.u64 %0, [remote];\n"
      "}"
      : "=l"(value)
      : "r"(address), "r"(rank)
      : "memory");
  return value;
}

// What block `rank` has in its `*own`.
template <class T>
__device__ __forceinline__ T remote_value(const T* own, uint32_t rank) {
  static_assert(sizeof(T) % 8 == 0 && alignof(T) == 8);
  uint64_t words[sizeof(T) / 8];
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 8); ++i)
    words[i] = load_remote(shared_address(own) + SharedAddress(8 * i), rank);
  T value;
  memcpy(&value, words, sizeof(T));
  return value;
}

}  // namespace trine
