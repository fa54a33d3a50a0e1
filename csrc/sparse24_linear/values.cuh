// What the kernels know of each type of values: its products, and how the words of indices become
// metadata of them.
//
// A product takes 32 bytes of each of 16 rows of values, one or two chunks, and 64 bytes of x.
#pragma once

#include "common/cuda/finish.cuh"
#include "common/cuda/matrix.cuh"
#include "sparse24_linear/cuda.h"

namespace trine {

struct Int8Values {
  using Operands = S8;
  using Sum = int32_t;
  static constexpr int kChunkBytes = 16;
  using Column = ColumnScaling;

  static __device__ __forceinline__ Column column(const DeviceLinear& linear, int64_t n) {
    return column_scaling(linear, n);
  }
  static __device__ __forceinline__ float finish(const DeviceLinear& linear, int32_t sum, int64_t m,
                                                 const Column& column) {
    return finished<0>(linear, sum, m, column);
  }
};

template <class Type, class Element_>
struct Float16Values {
  using Operands = Type;
  using Element = Element_;  // of x and y, too
  using Sum = float;
  static constexpr int kChunkBytes = 32;
  struct Column {
    float bias;
    bool has_bias;  // adding 0 would turn -0 into +0
  };

  static __device__ __forceinline__ Column column(const DeviceLinear& linear, int64_t n) {
    if (linear.bias == nullptr) return {0.0f, false};
    return {read_float(linear.bias, linear.bias_type, n), true};
  }
  static __device__ __forceinline__ float finish(const DeviceLinear&, float sum, int64_t,
                                                 const Column& column) {
    return column.has_bias ? sum + column.bias : sum;
  }
};

using HalfValues = Float16Values<F16, float16>;
using BfloatValues = Float16Values<Bf16, bfloat16>;

template <class Values>
inline constexpr bool kInt8Values = std::is_same_v<Values, Int8Values>;

}  // namespace trine
