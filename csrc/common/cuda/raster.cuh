// The order in which blocks take the tiles of y. Blocks that run at the same time share what they
// read: eight rows of tiles are gone through column by column, so that both operands' tiles are met
// again while they are in the L2.
#pragma once

#include "common/cuda/device.cuh"

namespace trine {

inline constexpr uint32_t kRasterRows = 8;

struct RasterPosition {
  int64_t row, column;  // of the tile
};

// There are fewer tiles than a grid holds blocks, 2^31; division in 64 bits would be a subroutine
// and many registers.
__device__ __forceinline__ RasterPosition raster_position(uint32_t index, uint32_t row_tiles,
                                                          uint32_t column_tiles) {
  const uint32_t group = index / (kRasterRows * column_tiles);
  const uint32_t first_row = group * kRasterRows;
  const uint32_t rows = row_tiles - first_row < kRasterRows ? row_tiles - first_row : kRasterRows;
  const uint32_t in_group = index - group * kRasterRows * column_tiles;
  return {first_row + in_group % rows, in_group / rows};
}

}  // namespace trine
