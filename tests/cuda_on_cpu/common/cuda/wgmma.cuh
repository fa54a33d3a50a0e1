// Twin of csrc/common/cuda/wgmma.cuh.
#pragma once

#include "common/cuda/matrix.cuh"
#include "common/cuda/tile.cuh"

namespace trine {

inline void wgmma_fence(std::source_location where = std::source_location::current()) {
  cuda_on_cpu::wgmma_fence(where);
}

inline void wgmma_commit(std::source_location where = std::source_location::current()) {
  cuda_on_cpu::wgmma_commit(where);
}

template <int kPending>
void wgmma_wait(std::source_location where = std::source_location::current()) {
  cuda_on_cpu::wgmma_wait(kPending, where);
}

template <class T, int kCount>
void touch(T (&)[kCount]) {}

template <class Operands, int kCount>
void wgmma(Operands, typename Operands::Sum (&sums)[kCount], TileDescriptor a, TileDescriptor b,
           bool accumulate, std::source_location where = std::source_location::current()) {
  cuda_on_cpu::wgmma({Operands::kKind, 2 * kCount, sums, nullptr, a.bits, b.bits, accumulate},
                     where);
}

template <class Operands, int kCount>
void wgmma(Operands, typename Operands::Sum (&sums)[kCount], const uint32_t (&a)[4],
           TileDescriptor b, bool accumulate,
           std::source_location where = std::source_location::current()) {
  cuda_on_cpu::wgmma({Operands::kKind, 2 * kCount, sums, a, 0, b.bits, accumulate}, where);
}

template <int kSelector, class Operands, int kCount>
void wgmma_sparse(Operands, typename Operands::Sum (&sums)[kCount], TileDescriptor a,
                  TileDescriptor b, const uint32_t& metadata, bool accumulate,
                  std::source_location where = std::source_location::current()) {
  cuda_on_cpu::wgmma({Operands::kKind, 2 * kCount, sums, nullptr, a.bits, b.bits, accumulate,
                      &metadata, kSelector},
                     where);
}

}  // namespace trine
