// Matrix fragments and products: ldmatrix, stmatrix, mma, wgmma. Which lane holds which element
// is written down from the PTX ISA section that a comment names, not from any kernel.
#pragma once

#include <cstdint>
#include <source_location>

namespace cuda_on_cpu {

enum class Kind { s8, f16, bf16 };  // int32 sums; float sums

// Two or four matrices.
void load_matrices(uint32_t* fragment, int matrices, uint32_t row, std::source_location where);
void store_matrices(uint32_t row, const uint32_t* fragment, std::source_location where);
void store_matrices_transposed(uint32_t row, const uint32_t* fragment, std::source_location where);

// `sums` are four int32 or float; a four words, b two.
void multiply(Kind kind, void* sums, const uint32_t* a, const uint32_t* b,
              std::source_location where);

// A is 2:4-sparse: b four words.
void multiply_sparse(Kind kind, int selector, void* sums, const uint32_t* a, const uint32_t* b,
                     uint32_t metadata, std::source_location where);

// What runs beside the threads until its group is waited for. `sums` and `a` are used then, not
// before: a kernel that touches them too early gets something else.
struct Wgmma {
  Kind kind;
  int columns;
  void* sums;               // columns / 2 of this lane
  const uint32_t* a;        // four words of this lane, or null: A is in shared memory, too
  uint64_t a_tile, b_tile;  // descriptors
  bool accumulate;
  const uint32_t* metadata = nullptr;  // of this lane, where A is sparse
  int selector = 0;
};
void wgmma(const Wgmma& operands, std::source_location where);
void wgmma_fence(std::source_location where);
void wgmma_commit(std::source_location where);
void wgmma_wait(unsigned pending, std::source_location where);

// Called by the scheduler.
void begin_matrix_units(unsigned threads);

}  // namespace cuda_on_cpu
