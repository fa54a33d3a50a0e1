// What the warp-specialised kernels of sm_90a share: one warpgroup brings tiles, two multiply them.
#pragma once

#include "common/cuda/barrier.cuh"

namespace trine {

inline constexpr int kGroupThreads = 4 * kWarpThreads;  // of a warpgroup
inline constexpr int kGroupRows = 64;                   // of A, that a warpgroup multiplies
inline constexpr int kRolesThreads = 3 * kGroupThreads;
inline constexpr int kConsumerWarps = 2 * kGroupThreads / kWarpThreads;
// Registers of a thread: 128 * 24 + 256 * 240 is what an SM has.
inline constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

// A ring of `count` tiles in shared memory. landed[i] ends a phase when tile i has all its bytes,
// free[i] when every consumer warp has read it.
template <int kCount, int kTileBytes>
struct Ring {
  SharedAddress tiles, landed, free;  // of the first

  struct Use {
    SharedAddress tile, landed, free;
    uint32_t parity;
  };

  // Of the tile that is used `number`-th, counted from 0.
  __device__ __forceinline__ Use use(int64_t number) const {
    const int index = int(number % kCount);
    return {tiles + index * kTileBytes, landed + index * int(sizeof(Mbarrier)),
            free + index * int(sizeof(Mbarrier)), uint32_t(number / kCount & 1)};
  }

  // By one thread.
  __device__ __forceinline__ void init() const {
    for (int i = 0; i < kCount; ++i) {
      mbarrier_init(landed + i * int(sizeof(Mbarrier)), 1);
      mbarrier_init(free + i * int(sizeof(Mbarrier)), kConsumerWarps);
    }
  }
};

}  // namespace trine
