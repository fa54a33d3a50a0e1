// The order in which blocks take the tiles of y. Blocks that run at the same time share what they
// read: eight rows of tiles are gone through column by column, so that both operands' tiles are met
// again while they are in the L2.
#pragma once

#include "common/cuda/device.cuh"

namespace trine {

inline constexpr int kRasterRows = 8;

struct RasterPosition {
  int64_t row, column;  // of the tile
};

__device__ __forceinline__ RasterPosition raster_position(int64_t index, int64_t row_tiles,
                                                          int64_t column_tiles) {
  const int64_t group = index / (kRasterRows * column_tiles);
  const int64_t first_row = group * kRasterRows;
  const int64_t rows = row_tiles - first_row < kRasterRows ? row_tiles - first_row : kRasterRows;
  const int64_t in_group = index - group * kRasterRows * column_tiles;
  return {first_row + in_group % rows, in_group / rows};
}

}  // namespace trine
