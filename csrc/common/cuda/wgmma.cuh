// wgmma (sm_90a): products of a warpgroup, four warps whose first has an index divisible by four. A
// is 64 rows, from shared memory or registers, B is kColumns rows of the same k, from shared
// memory; sums stay in registers. Which element is where: PTX ISA, "Asynchronous warpgroup level
// matrix instructions".
//
// It runs beside the threads. Registers that it uses may be touched only before wgmma_fence and
// after the wait for its group; shared memory may be overwritten only after that wait.
#pragma once

#include <type_traits>

#include "common/cuda/device.cuh"
#include "common/cuda/matrix.cuh"
#include "common/cuda/tile.cuh"

namespace trine {

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits for all groups but the last `kPending`. Follow it with touch(sums): the compiler does not
// know that the sums change here.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

template <class T, int kCount>
__device__ __forceinline__ void touch(T (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if constexpr (std::is_same_v<T, float>)
      asm volatile("" : "+f"(values[i])::"memory");
    else
      asm volatile("" : "+r"(values[i])::"memory");
}

// sums (+)= A * B^T, 64 x kColumns; what was in sums is dropped where `accumulate` is false. One k
// step: 32 bytes of each row.
//
// Overloads for S8 (int32 sums), F16 and Bf16 (float sums), with A from shared memory or from
// registers (laid out as for `multiply`, warp w of the warpgroup holding rows 16w to 16w + 15).

// clang-format off
#define TRINE_SUMS_4(c) c(sums[0]), c(sums[1]), c(sums[2]), c(sums[3])
#define TRINE_SUMS_8(c) TRINE_SUMS_4(c), \
  c(sums[4]), c(sums[5]), c(sums[6]), c(sums[7])
#define TRINE_SUMS_16(c) TRINE_SUMS_8(c), \
  c(sums[8]), c(sums[9]), c(sums[10]), c(sums[11]), c(sums[12]), c(sums[13]), c(sums[14]), c(sums[15])
#define TRINE_SUMS_32(c) TRINE_SUMS_16(c), \
  c(sums[16]), c(sums[17]), c(sums[18]), c(sums[19]), c(sums[20]), c(sums[21]), c(sums[22]), c(sums[23]), \
  c(sums[24]), c(sums[25]), c(sums[26]), c(sums[27]), c(sums[28]), c(sums[29]), c(sums[30]), c(sums[31])
#define TRINE_SUMS_64(c) TRINE_SUMS_32(c), \
  c(sums[32]), c(sums[33]), c(sums[34]), c(sums[35]), c(sums[36]), c(sums[37]), c(sums[38]), c(sums[39]), \
  c(sums[40]), c(sums[41]), c(sums[42]), c(sums[43]), c(sums[44]), c(sums[45]), c(sums[46]), c(sums[47]), \
  c(sums[48]), c(sums[49]), c(sums[50]), c(sums[51]), c(sums[52]), c(sums[53]), c(sums[54]), c(sums[55]), \
  c(sums[56]), c(sums[57]), c(sums[58]), c(sums[59]), c(sums[60]), c(sums[61]), c(sums[62]), c(sums[63])
#define TRINE_SUMS_88(c) TRINE_SUMS_64(c), \
  c(sums[64]), c(sums[65]), c(sums[66]), c(sums[67]), c(sums[68]), c(sums[69]), c(sums[70]), c(sums[71]), \
  c(sums[72]), c(sums[73]), c(sums[74]), c(sums[75]), c(sums[76]), c(sums[77]), c(sums[78]), c(sums[79]), \
  c(sums[80]), c(sums[81]), c(sums[82]), c(sums[83]), c(sums[84]), c(sums[85]), c(sums[86]), c(sums[87])
#define TRINE_SUMS_96(c) TRINE_SUMS_88(c), \
  c(sums[88]), c(sums[89]), c(sums[90]), c(sums[91]), c(sums[92]), c(sums[93]), c(sums[94]), c(sums[95])
#define TRINE_SUMS_128(c) TRINE_SUMS_96(c), \
  c(sums[96]), c(sums[97]), c(sums[98]), c(sums[99]), c(sums[100]), c(sums[101]), c(sums[102]), c(sums[103]), \
  c(sums[104]), c(sums[105]), c(sums[106]), c(sums[107]), c(sums[108]), c(sums[109]), c(sums[110]), c(sums[111]), \
  c(sums[112]), c(sums[113]), c(sums[114]), c(sums[115]), c(sums[116]), c(sums[117]), c(sums[118]), c(sums[119]), \
  c(sums[120]), c(sums[121]), c(sums[122]), c(sums[123]), c(sums[124]), c(sums[125]), c(sums[126]), c(sums[127])
#define TRINE_NAMES_4 "%0, %1, %2, %3"
#define TRINE_NAMES_8 TRINE_NAMES_4 \
  ", %4, %5, %6, %7"
#define TRINE_NAMES_16 TRINE_NAMES_8 \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define TRINE_NAMES_32 TRINE_NAMES_16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TRINE_NAMES_64 TRINE_NAMES_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TRINE_NAMES_88 TRINE_NAMES_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87"
#define TRINE_NAMES_96 TRINE_NAMES_88 \
  ", %88, %89, %90, %91, %92, %93, %94, %95"
#define TRINE_NAMES_128 TRINE_NAMES_96 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define TRINE_INT(sum) "+r"(sum)
#define TRINE_FLOAT(sum) "+f"(sum)

// The operands behind the sums are numbered %i0 on.
#define TRINE_WGMMA(Operands, Sum, kind, k, names, last, columns, count, i0, i1, i2, i3, i4, i5)                  \
  __device__ __forceinline__ void wgmma(Operands, Sum(&sums)[count], TileDescriptor a, TileDescriptor b,          \
                                        bool accumulate) {                                                        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " i2 ", 0;\n"                                                  \
                 "wgmma.mma_async.sync.aligned.m64n" #columns k "." names " {" TRINE_NAMES_##count "}, " i0 ", "   \
                 i1 ", p" TRINE_LAST_SHARED_##last ";\n}"                                                         \
                 : TRINE_SUMS_##count(kind)                                                                       \
                 : "l"(a.bits), "l"(b.bits), "r"(int(accumulate)));                                               \
  }                                                                                                               \
  __device__ __forceinline__ void wgmma(Operands, Sum(&sums)[count], const uint32_t(&a)[4], TileDescriptor b,     \
                                        bool accumulate) {                                                        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " i5 ", 0;\n"                                                  \
                 "wgmma.mma_async.sync.aligned.m64n" #columns k "." names " {" TRINE_NAMES_##count "}, {" i0 ", "  \
                 i1 ", " i2 ", " i3 "}, " i4 ", p" TRINE_LAST_REGISTERS_##last ";\n}"                             \
                 : TRINE_SUMS_##count(kind)                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(int(accumulate)));                \
  }
// Signs of A and B, and that k runs along the rows of both: 16-bit types only.
#define TRINE_LAST_SHARED_NONE ""
#define TRINE_LAST_REGISTERS_NONE ""
#define TRINE_LAST_SHARED_SIGNS ", 1, 1, 0, 0"
#define TRINE_LAST_REGISTERS_SIGNS ", 1, 1, 0"

#define TRINE_WGMMA_COLUMNS(columns, count, i0, i1, i2, i3, i4, i5)                                               \
  TRINE_WGMMA(S8, int32_t, TRINE_INT, "k32", "s32.s8.s8", NONE, columns, count, i0, i1, i2, i3, i4, i5)           \
  TRINE_WGMMA(F16, float, TRINE_FLOAT, "k16", "f32.f16.f16", SIGNS, columns, count, i0, i1, i2, i3, i4, i5)       \
  TRINE_WGMMA(Bf16, float, TRINE_FLOAT, "k16", "f32.bf16.bf16", SIGNS, columns, count, i0, i1, i2, i3, i4, i5)
TRINE_WGMMA_COLUMNS(8, 4, "%4", "%5", "%6", "%7", "%8", "%9")
TRINE_WGMMA_COLUMNS(16, 8, "%8", "%9", "%10", "%11", "%12", "%13")
TRINE_WGMMA_COLUMNS(32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
TRINE_WGMMA_COLUMNS(64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
TRINE_WGMMA_COLUMNS(128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
TRINE_WGMMA_COLUMNS(256, 128, "%128", "%129", "%130", "%131", "%132", "%133")

// The same with a sparse A from shared memory: 32 bytes of each of its rows hold the stored two of
// every four k, in order; B takes 64 bytes of each row, twice the k of a dense step. `metadata` says
// which k they are: a nibble for two values, the position of the first in the low two bits, never
// twice the same. S8: the 32 k from 32 * (lane % 4 / 2) on of row lane / 4 + 8 * (lane % 2) of the
// warp's 16; kSelector is 0. 16-bit types: lanes whose lane % 4 / 2 is kSelector bring the 16 k from
// 16 * (lane % 2) on of row lane / 4 in the low half, of the row eight below in the high half.
#define TRINE_WGMMA_SPARSE(Operands, Sum, kind, k, names, last, columns, count, i0, i1, i2, i3, i4)               \
  template <int kSelector>                                                                                        \
  __device__ __forceinline__ void wgmma_sparse(Operands, Sum(&sums)[count], TileDescriptor a, TileDescriptor b,   \
                                               const uint32_t& metadata, bool accumulate) {                       \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " i4 ", 0;\n"                                                  \
                 "wgmma.mma_async.sp.sync.aligned.m64n" #columns k "." names " {" TRINE_NAMES_##count "}, " i0 ", "\
                 i1 ", " i2 ", " i3 ", p" TRINE_LAST_SHARED_##last ";\n}"                                         \
                 : TRINE_SUMS_##count(kind)                                                                       \
                 : "l"(a.bits), "l"(b.bits), "r"(metadata), "n"(kSelector), "r"(int(accumulate)));                \
  }
#define TRINE_WGMMA_SPARSE_COLUMNS(columns, count, i0, i1, i2, i3, i4)                                            \
  TRINE_WGMMA_SPARSE(S8, int32_t, TRINE_INT, "k64", "s32.s8.s8", NONE, columns, count, i0, i1, i2, i3, i4)        \
  TRINE_WGMMA_SPARSE(F16, float, TRINE_FLOAT, "k32", "f32.f16.f16", SIGNS, columns, count, i0, i1, i2, i3, i4)    \
  TRINE_WGMMA_SPARSE(Bf16, float, TRINE_FLOAT, "k32", "f32.bf16.bf16", SIGNS, columns, count, i0, i1, i2, i3, i4)
TRINE_WGMMA_SPARSE_COLUMNS(64, 32, "%32", "%33", "%34", "%35", "%36")
TRINE_WGMMA_SPARSE_COLUMNS(128, 64, "%64", "%65", "%66", "%67", "%68")
TRINE_WGMMA_SPARSE_COLUMNS(176, 88, "%88", "%89", "%90", "%91", "%92")
TRINE_WGMMA_SPARSE_COLUMNS(192, 96, "%96", "%97", "%98", "%99", "%100")
// clang-format on
#undef TRINE_WGMMA_SPARSE_COLUMNS
#undef TRINE_WGMMA_SPARSE
#undef TRINE_WGMMA_COLUMNS
#undef TRINE_WGMMA

}  // namespace trine
