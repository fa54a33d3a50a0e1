// From int32 sums to outputs, in the order and with the roundings that linear.h states.
#pragma once

#include "common/cuda/convert.cuh"
#include "common/cuda/device.cuh"
#include "common/cuda/linear.h"

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

__device__ __forceinline__ void write_float(void* values, FloatType type, int64_t i, float value) {
  switch (type) {
    case FloatType::bfloat16:
      static_cast<bfloat16*>(values)[i] = narrow_to_bfloat16(value);
      return;
    case FloatType::float16:
      static_cast<float16*>(values)[i] = narrow_to_float16(value);
      return;
    default:
      static_cast<float*>(values)[i] = value;
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
