// Twin of csrc/common/cuda/tma.cuh.
#pragma once

#include "async_copies.h"
#include "common/cuda/barrier.cuh"
#include "common/cuda/tile.cuh"

namespace trine {

using cuda_on_cpu::store_tile, cuda_on_cpu::store_tile_commit, cuda_on_cpu::TensorMap;

inline TensorMap make_tensor_map(const char*, const void* data, int64_t rows, int64_t width,
                                 int64_t row_bytes, int box_rows, int box_bytes = kTileRowBytes) {
  return {static_cast<unsigned char*>(const_cast<void*>(data)),
          rows,
          width,
          row_bytes,
          box_rows,
          box_bytes};
}

inline void load_tile(SharedAddress to, const TensorMap& map, int x, int y, SharedAddress barrier) {
  cuda_on_cpu::load_tile(to, map, x, y, barrier, 0);
}

inline void load_tile_multicast(SharedAddress to, const TensorMap& map, int x, int y,
                                SharedAddress barrier, uint16_t ranks) {
  cuda_on_cpu::load_tile(to, map, x, y, barrier, ranks);
}

template <int kPending>
void store_tile_wait_read() {
  cuda_on_cpu::store_tile_wait_read(kPending);
}

inline void prefetch_tensor_map(const TensorMap&) {}

}  // namespace trine
