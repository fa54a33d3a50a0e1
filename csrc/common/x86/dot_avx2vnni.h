// vpdpbusd on 256-bit registers: 32 unsigned by 32 signed bytes, added up in eight int32 lanes.
//
// It has two encodings. Kernels for AVX-VNNI have the one that needs no AVX-512; the other is for
// tests on processors that have only it, see Isa::avx2vnni_evex.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace trine {
namespace {

// Not __m256i, which has 64-bit lanes: gcc 12 spills sums whose type changes at each instruction.
using Int32x8 = int32_t __attribute__((vector_size(32)));

[[maybe_unused]] inline Int32x8 dot(Int32x8 sum, __m256i u, __m256i s) {
#if defined(__AVXVNNI__)
  return (Int32x8)_mm256_dpbusd_avx_epi32((__m256i)sum, u, s);
#else
  return (Int32x8)_mm256_dpbusd_epi32((__m256i)sum, u, s);
#endif
}

}  // namespace
}  // namespace trine
