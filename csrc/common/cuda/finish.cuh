// From int32 sums to outputs, in the order and with the roundings that linear.h states.
#pragma once

#include "common/cuda/convert.cuh"
#include "common/cuda/device.cuh"
#include "common/cuda/linear.h"
#include "common/cuda/memory.cuh"

namespace trine {

__device__ __forceinline__ float read_float(const void* values, FloatType type, int64_t i) {
  switch (type) {
    case FloatType::bfloat16:
      return widen_on_device(static_cast<const bfloat16*>(values)[i]);
    case FloatType::float16:
      return widen_on_device(static_cast<const float16*>(values)[i]);
    default:
      return static_cast<const float*>(values)[i];
  }
}

__device__ __forceinline__ void write_float(float* to, float value) { *to = value; }
__device__ __forceinline__ void write_float(bfloat16* to, float value) {
  *to = narrow_to_bfloat16(value);
}
__device__ __forceinline__ void write_float(float16* to, float value) {
  *to = narrow_to_float16(value);
}

__device__ __forceinline__ void write_float(void* values, FloatType type, int64_t i, float value) {
  switch (type) {
    case FloatType::bfloat16:
      return write_float(static_cast<bfloat16*>(values) + i, value);
    case FloatType::float16:
      return write_float(static_cast<float16*>(values) + i, value);
    default:
      return write_float(static_cast<float*>(values) + i, value);
  }
}

// Copies `kRows` rows of outputs from shared to global memory: rows of kRowBytes, kStride apart, to
// y[m0 + row][n0 ...]. By a warp, 16 bytes a lane where rows of y begin at whole units.
template <class T, int kRows, int kRowBytes, int kStride>
__device__ __forceinline__ void store_rows(const DeviceLinear& linear, int64_t m0, int64_t n0,
                                           const unsigned char* staging) {
  constexpr int kUnits = kRows * kRowBytes / 16, kBytes = int(sizeof(T));
  T* const y = static_cast<T*>(linear.y);
  const bool whole_units = linear.n * kBytes % 16 == 0;
#pragma unroll
  for (uint32_t unit = threadIdx.x % kWarpThreads; unit < kUnits; unit += kWarpThreads) {
    const uint32_t row = unit / (kRowBytes / 16), at = unit % (kRowBytes / 16) * 16;
    const int64_t m = m0 + row, n = n0 + at / kBytes;
    const unsigned char* from = staging + row * kStride + at;
    if (m >= linear.m) continue;
    if (whole_units) {
      if (n < linear.n) store_global<16>(y + m * linear.n + n, from);
    } else {
      for (int i = 0; i < 16 / kBytes; ++i)
        if (n + i < linear.n) store_global<kBytes>(y + m * linear.n + n + i, from + i * kBytes);
    }
  }
}

// The same of floats that still are to be activated: one place for that code, a loop, where outputs
// in registers would need a copy for each. A lane takes every 32nd float of a row.
template <int kRows, int kRowBytes, int kStride>
__device__ __forceinline__ void store_activated_rows(const DeviceLinear& linear, int64_t m0,
                                                     int64_t n0, const unsigned char* staging) {
  constexpr int kColumns = kRowBytes / int(sizeof(float));
#pragma unroll 1
  for (int i = int(threadIdx.x) % kWarpThreads; i < kRows * kColumns; i += kWarpThreads) {
    const int64_t m = m0 + i / kColumns, n = n0 + i % kColumns;
    if (m >= linear.m || n >= linear.n) continue;
    const float value =
        *reinterpret_cast<const float*>(staging + i / kColumns * kStride + i % kColumns * 4);
    write_float(linear.y, linear.type, m * linear.n + n, activated(linear.activation, value));
  }
}

// What an output adds and multiplies by its column; loaded once for many rows.
struct ColumnScaling {
  int32_t minus;
  float scale, bias;
  bool has_bias;  // adding 0 would turn -0 into +0
};

__device__ __forceinline__ ColumnScaling column_scaling(const DeviceLinear& linear, int64_t n) {
  return {linear.column_minus == nullptr ? 0 : linear.column_minus[n],
          linear.weight_scale[linear.per_tensor ? 0 : n],
          linear.bias == nullptr ? 0.0f : read_float(linear.bias, linear.bias_type, n),
          linear.bias != nullptr};
}

// kOffset: what the weight's values carry above the true ones. Products and differences wrap, as
// the sums do; the result is the true sum again.
template <int32_t kOffset>
__device__ __forceinline__ float finished(const DeviceLinear& linear, int32_t sum, int64_t m,
                                          const ColumnScaling& column) {
  uint32_t acc = uint32_t(sum) - uint32_t(column.minus);
  if constexpr (kOffset != 0) acc -= uint32_t(kOffset) * uint32_t(linear.x_sum[m]);
  const float scaled = (float(int32_t(acc)) * linear.x_scale[m]) * column.scale;
  return column.has_bias ? scaled + column.bias : scaled;
}

}  // namespace trine
