// Two int8 weights as 16-bit floats, exact: bytes 2 * kPair and 2 * kPair + 1 of a word, the first
// in the low half.
#pragma once

#include "common/cuda/matrix.cuh"
#include "common/cuda/pairs.cuh"

namespace trine {
namespace {

// Between 1024 and 2048 halves are one apart: 0x6400 | b is 1024 + b, of which b = w + 128.
template <int kPair>
__device__ __forceinline__ uint32_t widen_codes(F16, uint32_t word) {
  constexpr uint32_t k1152 = 0x64806480u;
  const uint32_t biased = word ^ 0x80808080u;
  return subtract_pair_float16(__byte_perm(biased, 0x64646464u, kPair == 0 ? 0x4140 : 0x4342),
                               k1152);
}

// bfloat16 has a bit less: 128 + the low seven bits, less 128 or, if the sign is set, 256.
template <int kPair>
__device__ __forceinline__ uint32_t widen_codes(Bf16, uint32_t word) {
  constexpr uint32_t kOne = 0x3f803f80u;
  const uint32_t bytes = __byte_perm(word, 0u, kPair == 0 ? 0x4140 : 0x4342);
  return multiply_add_pair_bfloat16((bytes & 0x007f007fu) | 0x43004300u, kOne,
                                    (bytes & 0x00800080u) | 0xc300c300u);
}

}  // namespace
}  // namespace trine
