// Matrix fragments of a warp (sm_80): from and to shared memory, and their product. Where a lane's
// elements belong is in the PTX ISA, "Matrix multiply-accumulate operation using mma" and "...
// using mma.sp".
#pragma once

#include "common/cuda/device.cuh"

namespace trine {

// Four 8x8 matrices of 16-bit elements (or 8 rows of 16 bytes each). Lanes 8i .. 8i + 7 bring the
// addresses of the rows of matrix i, multiples of 16; fragment[i] is of matrix i: of row lane / 4,
// bytes 4 * (lane % 4) on.
__device__ __forceinline__ void load_matrices(uint32_t (&fragment)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(row)
               : "memory");
}

// Two of them: lanes 0 to 15 bring addresses; those of the others must be multiples of 16, too.
__device__ __forceinline__ void load_matrix_pair(uint32_t (&fragment)[2], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(fragment[0]), "=r"(fragment[1])
               : "r"(row)
               : "memory");
}

// The reverse of load_matrices (sm_90).
__device__ __forceinline__ void store_matrices(SharedAddress row, const uint32_t (&fragment)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
               : "memory");
}

// The same of 16-bit elements, each matrix transposed: row r is what the fragments hold as column
// r.
__device__ __forceinline__ void store_matrices_transposed(SharedAddress row,
                                                          const uint32_t (&fragment)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
               : "memory");
}

// Types of the operands of a product.
struct S8 {};    // signed bytes: k = 32, sums in int32
struct F16 {};   // k = 16, sums in float
struct Bf16 {};  // k = 16, sums in float

// sums += A (16 x k) * B (k x 8).
__device__ __forceinline__ void multiply(S8, int32_t (&sums)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#define TRINE_MULTIPLY_16(Type, name)                                                      \
  __device__ __forceinline__ void multiply(Type, float (&sums)[4], const uint32_t (&a)[4], \
                                           const uint32_t (&b)[2]) {                       \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                             \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"             \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));               \
  }
TRINE_MULTIPLY_16(F16, "f16")
TRINE_MULTIPLY_16(Bf16, "bf16")
#undef TRINE_MULTIPLY_16

// sums += A * B where A is 2:4-sparse: two of every four values of a row are stored, ascending. A
// lane holds stored values as it holds those of a dense A of that many columns; k, the columns of B
// and of the whole A, is twice the dense one. `metadata` says which two, in the bits that the
// stored values have in a row: two bits each, low ones first. Of lanes 4r .. 4r + 3,
//   S8          0 and 1 hold those of the first half of k of rows r and r + 8, 2 and 3 those of the
//               second; kSelector is 0
//   F16, Bf16   2 * kSelector and the next one hold those of the two halves of k, of row r in
//               the low and of row r + 8 in the high 16 bits; the others are not read
// A pair that does not ascend gives an undefined number.
template <int kSelector>
__device__ __forceinline__ void multiply_sparse(S8, int32_t (&sums)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[4], uint32_t metadata) {
  static_assert(kSelector == 0);
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "r"(metadata), "n"(kSelector));
}

#define TRINE_MULTIPLY_SPARSE_16(Type, name)                                                      \
  template <int kSelector>                                                                        \
  __device__ __forceinline__ void multiply_sparse(Type, float (&sums)[4], const uint32_t (&a)[4], \
                                                  const uint32_t (&b)[4], uint32_t metadata) {    \
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." name "." name               \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, "         \
        "%12, %13;"                                                                               \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                              \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), \
          "r"(metadata), "n"(kSelector));                                                         \
  }
TRINE_MULTIPLY_SPARSE_16(F16, "f16")
TRINE_MULTIPLY_SPARSE_16(Bf16, "bf16")
#undef TRINE_MULTIPLY_SPARSE_16

}  // namespace trine
