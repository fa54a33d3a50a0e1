// For input that cannot be checked without waiting for the device.
#pragma once

#include <cassert>

#include "common/cuda/device.cuh"

#ifdef NDEBUG  // <cassert> declares it otherwise
extern "C" __host__ __device__ void __assert_fail(const char* assertion, const char* file,
                                                  unsigned int line, const char* function) noexcept
    __attribute__((__noreturn__));
#endif

namespace trine {

// Stops the kernel, and with it the process' use of the device, as torch's own kernels do; also in
// a release, which has no assert.
__device__ __forceinline__ void device_assert(bool condition, const char* message) {
  if (!condition) __assert_fail(message, __FILE__, __LINE__, __func__);
}

}  // namespace trine
