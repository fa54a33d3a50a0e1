// Twin of csrc/common/cuda/device.cuh: the CUDA language for the host compiler. Add what a kernel
// uses; semantics from the CUDA C++ Programming Guide.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "emulator.h"
#include "shared_memory.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

// One array for each place in the source (and each instance of a template), whoever comes first.
#define TRINE_SHARED_ARRAY(type, name, count)        \
  static const char name##_key = 0;                  \
  type(&name)[count] = *static_cast<type(*)[count]>( \
      ::cuda_on_cpu::shared_array(&name##_key, sizeof(type) * (count), alignof(type)))

#define TRINE_DYNAMIC_SHARED(name) unsigned char* const name = ::cuda_on_cpu::dynamic_shared()

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  cuda_on_cpu::block_barrier(where);
}

inline void __syncwarp(std::source_location where = std::source_location::current()) {
  int nothing = 0;
  cuda_on_cpu::meet_lanes("__syncwarp", 0xffffffffu, &nothing, where,
                          [](const cuda_on_cpu::Posts&) {});
}

// Whether `value` is true for all threads of the block.
inline bool __syncthreads_and(bool value,
                              std::source_location where = std::source_location::current()) {
  static const char key = 0;
  int& all = *static_cast<int*>(::cuda_on_cpu::shared_array(&key, sizeof(int), alignof(int)));
  __syncthreads(where);
  all = 1;
  __syncthreads(where);
  if (!value) all = 0;
  __syncthreads(where);
  const bool result = all != 0;
  __syncthreads(where);
  return result;
}

// The value of lane ^ lane_mask; within segments of `width` lanes, a lane whose partner is in a
// later segment keeps its own.
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = cuda_on_cpu::kLanes,
                  std::source_location where = std::source_location::current()) {
  struct Input {
    T value;
    int lane_mask, width;
  };
  return cuda_on_cpu::warp_collective(
      "__shfl_xor_sync", mask, Input{value, lane_mask, width},
      [where](const auto& inputs, int lane) {
        const Input& own = *inputs[lane];
        const int segment_end = lane | (own.width - 1);
        const int partner = lane ^ own.lane_mask;
        if (partner > segment_end) return own.value;
        if (partner < 0 || inputs[partner] == nullptr)
          cuda_on_cpu::fail("lane %d reads lane %d at %s:%u, which the mask does not name", lane,
                            partner, where.file_name(), unsigned(where.line()));
        return inputs[partner]->value;
      },
      where);
}

inline uint32_t atomicOr(uint32_t* at, uint32_t bits) {
  const uint32_t before = *at;
  *at |= bits;
  return before;
}

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};

inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }

// Each nibble of `selector` names one of the eight bytes of (high, low).
// The 32 bits from bit `shift` % 32 on.
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return uint32_t((uint64_t(high) << 32 | low) >> shift % 32);
}

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7u) & 0xffu) << 8 * i;
  return result;
}

// total + the dot product of four signed bytes with four signed bytes.
inline int32_t __dp4a(int32_t a, int32_t b, int32_t total) {
  for (int i = 0; i < 4; ++i) total += int8_t(a >> 8 * i) * int8_t(b >> 8 * i);
  return total;
}

namespace trine {

inline constexpr int kWarpThreads = cuda_on_cpu::kLanes;
inline constexpr uint32_t kWholeWarp = 0xffffffffu;

using SharedAddress = uint32_t;
using cuda_on_cpu::shared_address;

}  // namespace trine
