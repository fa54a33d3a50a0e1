// cp.async (sm_80): copies from global to shared memory that pass by the registers. A thread's
// copies form groups; what a group copied may be read after a wait for it and, by other threads,
// after a barrier behind that.
#pragma once

#include "common/cuda/device.cuh"

namespace trine {

// 16 bytes, kept out of the L1, or 4; both addresses are multiples of that. Where `valid` is false
// nothing is read, and zeros are written.
template <int kBytes = 16>
__device__ __forceinline__ void copy_async(SharedAddress to, const void* from, bool valid) {
  static_assert(kBytes == 16 || kBytes == 4);
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
                 "r"(valid ? 4 : 0)
                 : "memory");
}

// Closes the group of the copies since the last call, even if there were none.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all groups of this thread but the last `kPending`.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace trine
