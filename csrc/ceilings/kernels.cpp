#include "ceilings/ceilings.h"
#include "common/dispatch.h"

namespace trine {
namespace {

constexpr int64_t ops(int64_t lanes, int accumulators = kAccumulators) {
  return 2 * lanes * accumulators;
}

constexpr CeilingKernel kKernels[] = {
#ifdef TRINE_X86
    {Isa::avx512vnni, read_avx512, dot_int8_avx512vnni, ops(64), fma_fp32_avx512, ops(16)},
    {Isa::avx512, read_avx512, dot_int8_avx512, ops(64), fma_fp32_avx512, ops(16)},
    {Isa::avx2vnni, read_avx2, dot_int8_avx2vnni, ops(32), fma_fp32_avx2, ops(8)},
    {Isa::avx2vnni_evex, read_avx2, dot_int8_avx2vnni_evex, ops(32), fma_fp32_avx2, ops(8)},
    {Isa::avx2, read_avx2, dot_int8_avx2, ops(32, kAddAccumulators), fma_fp32_avx2, ops(8)},
#endif
    {Isa::scalar, read_scalar, dot_int8_scalar, ops(1), fma_fp32_scalar, ops(1)},
};

}  // namespace

const CeilingKernel& ceiling_kernel() { return select(kKernels); }

}  // namespace trine
