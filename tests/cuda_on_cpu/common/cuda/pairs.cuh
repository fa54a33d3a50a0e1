// Twin of csrc/common/cuda/pairs.cuh, by way of fp32: what kernels compute so is exact there.
#pragma once

#include "common/cuda/convert.cuh"

namespace trine {

inline uint32_t subtract_pair_float16(uint32_t a, uint32_t b) {
  const auto half = [](uint32_t bits) { return widen(float16{uint16_t(bits)}); };
  return narrow_pair_to_float16(half(a) - half(b), half(a >> 16) - half(b >> 16));
}

inline uint32_t multiply_add_pair_bfloat16(uint32_t a, uint32_t b, uint32_t c) {
  const auto half = [](uint32_t bits) { return widen(bfloat16{uint16_t(bits)}); };
  return narrow_pair_to_bfloat16(std::fma(half(a), half(b), half(c)),
                                 std::fma(half(a >> 16), half(b >> 16), half(c >> 16)));
}

}  // namespace trine
