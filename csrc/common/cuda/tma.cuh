// The copy engine (sm_90): boxes of a matrix between global and shared memory, by one thread. A
// load signals an mbarrier with its bytes; stores form groups, as cp.async does.
//
// Rows of a box are 128 bytes and lie in shared memory as tile.cuh says; narrower ones lie one
// after the other. What a box covers beyond the matrix reads as zeros and is not written; it counts
// as bytes all the same.
#pragma once

#include <cuda.h>

#include <stdexcept>
#include <string>

#include "common/cuda/barrier.cuh"
#include "common/cuda/device.cuh"
#include "common/cuda/tile.cuh"

namespace trine {

// A kernel takes it as a `const __grid_constant__ TensorMap` parameter.
using TensorMap = CUtensorMap;

// A matrix of `rows` rows, `row_bytes` apart, of which `width` bytes count; boxes of `box_rows`
// rows of `box_bytes` bytes. `data`, `row_bytes` and box_bytes must be multiples of 16, box_rows at
// most 256.
inline TensorMap make_tensor_map(const char* op, const void* data, int64_t rows, int64_t width,
                                 int64_t row_bytes, int box_rows, int box_bytes = kTileRowBytes) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;  // asked of the runtime: nothing links with the driver
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                     &result);
    return reinterpret_cast<Encode>(found);
  }();
  if (encode == nullptr)
    throw std::runtime_error(std::string(op) + ": this CUDA driver cannot make tensor maps");
  TensorMap map;
  const cuuint64_t dims[2] = {cuuint64_t(width), cuuint64_t(rows)};
  const cuuint64_t strides[1] = {cuuint64_t(row_bytes)};
  const cuuint32_t box[2] = {cuuint32_t(box_bytes), cuuint32_t(box_rows)}, steps[2] = {1, 1};
  const auto swizzle =
      box_bytes == kTileRowBytes ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE;
  const CUresult error =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(data), dims, strides, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS)
    throw std::runtime_error(std::string(op) + ": the CUDA driver refused a tensor map (error " +
                             std::to_string(error) + ")");
  return map;
}

// The box whose first byte is byte `x` of row `y`.
__device__ __forceinline__ void load_tile(SharedAddress to, const TensorMap& map, int x, int y,
                                          SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}

// The same into the blocks of the cluster whose ranks are set in `ranks`, at the same address; each
// block's barrier gets the bytes.
__device__ __forceinline__ void load_tile_multicast(SharedAddress to, const TensorMap& map, int x,
                                                    int y, SharedAddress barrier, uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(x), "r"(y), "r"(barrier), "h"(ranks)
      : "memory");
}

// What was stored to `from` must be visible to the copy engine: fence_async_proxy and a barrier.
__device__ __forceinline__ void store_tile(const TensorMap& map, int x, int y, SharedAddress from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(
          &map),
      "r"(x), "r"(y), "r"(from)
      : "memory");
}

// Closes the group of this thread's stores since the last call.
__device__ __forceinline__ void store_tile_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all groups of this thread but the last `kPending` have read shared memory.
template <int kPending>
__device__ __forceinline__ void store_tile_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Fetches the map itself, ahead of its first use.
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

}  // namespace trine
