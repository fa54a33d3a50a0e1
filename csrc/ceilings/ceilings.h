// What this machine can do at most, to judge kernels by: the rates at which one thread reads memory
// and retires int8 dot products and fp32 fused multiply-adds, with nothing else in the loop.
//
// Each function does a fixed amount of work and returns a value that depends on all of it, so that
// the compiler cannot drop any. The caller takes the time and divides.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace trine {

// Sums the 64-bit words of [data, data + bytes). How fast that goes depends on the processor's
// prefetchers, so that the caller tries several ways and keeps the best: `streams` (1, 2, 4, 8 or
// 16) places are read at once, and the line `ahead` bytes on in each is asked for (0: none is).
using ReadFn = uint64_t(const void* data, int64_t bytes, int streams, int64_t ahead);

// Runs `repeats` rounds of kCeilingOps multiply-and-add operations (a multiplication and an
// addition count as two), independent enough to fill every execution port.
using ComputeFn = float(int64_t repeats);

struct CeilingKernel {
  Isa needs;
  ReadFn* read;
  ComputeFn* dot_int8;
  int64_t dot_int8_ops;  // in one round
  ComputeFn* fma_fp32;
  int64_t fma_fp32_ops;  // in one round
};

// More accumulators than latency x ports of any processor that we know (4-5 cycles x 2), and few
// enough to stay in 16 registers.
inline constexpr int kAccumulators = 12;
// With 16 registers and three more values in the loop gcc spills some of 12; where the accumulator
// goes through an addition alone (1 cycle), 6 suffice.
inline constexpr int kAddAccumulators = 6;

ReadFn read_scalar, read_avx2, read_avx512;
ComputeFn dot_int8_scalar, dot_int8_avx2, dot_int8_avx512, dot_int8_avx512vnni;
ComputeFn dot_int8_avx2vnni, dot_int8_avx2vnni_evex;
ComputeFn fma_fp32_scalar, fma_fp32_avx2, fma_fp32_avx512;

TRINE_API const CeilingKernel& ceiling_kernel();

}  // namespace trine
