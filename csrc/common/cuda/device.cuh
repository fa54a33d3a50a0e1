// The CUDA language itself: thread indices, barriers, shuffles, intrinsics.
//
// Every header of this folder that names an instruction has a twin of the same path under
// tests/cuda_on_cpu, which the host compiler finds first when it compiles a kernel to run on the
// CPU. Kernels keep CUDA's own names (threadIdx, __syncthreads, __shfl_xor_sync); only what the
// host compiler cannot parse is wrapped: shared arrays here, launches in launch.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// An array of the block's shared memory, not initialised.
#define TRINE_SHARED_ARRAY(type, name, count) __shared__ type name[count]

// The bytes that the launch asked for, aligned for the copy engine's swizzle of 1024 bytes.
#define TRINE_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

namespace trine {

// What instructions that name shared memory take: an offset in the block's window.
using SharedAddress = uint32_t;

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

inline constexpr int kWarpThreads = 32;
inline constexpr uint32_t kWholeWarp = 0xffffffffu;

}  // namespace trine
