// How tiles of a matrix lie in shared memory for the copy engine and wgmma (sm_90): rows of 128
// bytes, one after the other, swizzled: the 16-byte unit at address a goes to swizzled(a), so that
// the rows of a matrix fragment fall in different banks. Tiles begin at multiples of 1024.
#pragma once

#include "common/cuda/device.cuh"

namespace trine {

inline constexpr int kTileRowBytes = 128;

// Address bits 4 to 6 (the unit in the row) by bits 7 to 9 (the row among eight).
__host__ __device__ constexpr uint32_t swizzled(uint32_t address) {
  return address ^ (address >> 3 & 0x70u);
}

// The matrix descriptor of wgmma; its fields: PTX ISA, "Matrix descriptor format".
struct TileDescriptor {
  uint64_t bits;
};

// Of a tile whose k runs along the rows. `address` is that of a row divisible by 8, plus the 32
// bytes of a k step as many times as steps have been done.
__device__ __forceinline__ TileDescriptor tile_descriptor(SharedAddress address) {
  constexpr uint64_t kEightRows = 8 * kTileRowBytes;  // from one group of rows to the next
  constexpr uint64_t kSwizzle128 = 1;
  return {uint64_t(address & 0x3ffffu) >> 4 | uint64_t(1) << 16 | kEightRows >> 4 << 32 |
          kSwizzle128 << 62};
}

}  // namespace trine
