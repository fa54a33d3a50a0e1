// Sums, maxima and the like over threads.
#pragma once

#include "common/cuda/device.cuh"

namespace trine {

struct Maximum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

// Combines `value` over each run of kLanes consecutive lanes (a power of two); every lane gets the
// result. The whole warp must take part.
template <int kLanes, class T, class Combine>
__device__ T reduce_lanes(T value, Combine combine) {
  static_assert(kLanes <= kWarpThreads && (kLanes & (kLanes - 1)) == 0);
  for (int step = kLanes / 2; step > 0; step /= 2)
    value = combine(value, __shfl_xor_sync(kWholeWarp, value, step));
  return value;
}

// Combines `value` over each run of kThreads consecutive threads: less than a warp, or the whole
// block. Every thread gets the result, and the whole block must take part.
//
// `warp_results` is shared memory of kThreads / 32 elements (not read for less than a warp). It is
// for one call only: a second one would need a barrier before it.
template <int kThreads, class T, class Combine>
__device__ T reduce_threads(T value, Combine combine, T* warp_results) {
  if constexpr (kThreads <= kWarpThreads) {
    return reduce_lanes<kThreads>(value, combine);
  } else {
    constexpr int kWarps = kThreads / kWarpThreads;
    const int lane = threadIdx.x % kWarpThreads;
    value = reduce_lanes<kWarpThreads>(value, combine);
    if (lane == 0) warp_results[threadIdx.x / kWarpThreads] = value;
    __syncthreads();
    return reduce_lanes<kWarps>(warp_results[lane % kWarps], combine);
  }
}

}  // namespace trine
