// Twin of csrc/common/cuda/matrix.cuh.
#pragma once

#include "common/cuda/device.cuh"
#include "matrix_units.h"

namespace trine {

struct S8 {
  static constexpr auto kKind = cuda_on_cpu::Kind::s8;
  using Sum = int32_t;
};
struct F16 {
  static constexpr auto kKind = cuda_on_cpu::Kind::f16;
  using Sum = float;
};
struct Bf16 {
  static constexpr auto kKind = cuda_on_cpu::Kind::bf16;
  using Sum = float;
};

inline void load_matrices(uint32_t (&fragment)[4], SharedAddress row,
                          std::source_location where = std::source_location::current()) {
  cuda_on_cpu::load_matrices(fragment, 4, row, where);
}

inline void load_matrix_pair(uint32_t (&fragment)[2], SharedAddress row,
                             std::source_location where = std::source_location::current()) {
  cuda_on_cpu::load_matrices(fragment, 2, row, where);
}

inline void store_matrices(SharedAddress row, const uint32_t (&fragment)[4],
                           std::source_location where = std::source_location::current()) {
  cuda_on_cpu::store_matrices(row, fragment, where);
}

inline void store_matrices_transposed(
    SharedAddress row, const uint32_t (&fragment)[4],
    std::source_location where = std::source_location::current()) {
  cuda_on_cpu::store_matrices_transposed(row, fragment, where);
}

template <class Operands>
void multiply(Operands, typename Operands::Sum (&sums)[4], const uint32_t (&a)[4],
              const uint32_t (&b)[2],
              std::source_location where = std::source_location::current()) {
  cuda_on_cpu::multiply(Operands::kKind, sums, a, b, where);
}

template <int kSelector, class Operands>
void multiply_sparse(Operands, typename Operands::Sum (&sums)[4], const uint32_t (&a)[4],
                     const uint32_t (&b)[4], uint32_t metadata,
                     std::source_location where = std::source_location::current()) {
  cuda_on_cpu::multiply_sparse(Operands::kKind, kSelector, sums, a, b, metadata, where);
}

}  // namespace trine
