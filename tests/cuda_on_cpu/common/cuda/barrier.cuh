// Twin of csrc/common/cuda/barrier.cuh.
#pragma once

#include "async_copies.h"
#include "common/cuda/device.cuh"
#include "shared_memory.h"

namespace trine {

using Mbarrier = uint64_t;
using cuda_on_cpu::fence_async_proxy, cuda_on_cpu::fence_mbarrier_init;
using cuda_on_cpu::mbarrier_arrive, cuda_on_cpu::mbarrier_arrive_expect, cuda_on_cpu::mbarrier_init;
using cuda_on_cpu::named_barrier_arrive;

inline void named_barrier_sync(int id, int threads,
                               std::source_location where = std::source_location::current()) {
  cuda_on_cpu::named_barrier_sync(id, threads, where);
}

inline void mbarrier_arrive_remote(SharedAddress barrier, uint32_t rank) {
  mbarrier_arrive(cuda_on_cpu::address_in_block(barrier, rank));
}

inline void mbarrier_wait(SharedAddress barrier, uint32_t parity,
                          std::source_location where = std::source_location::current()) {
  cuda_on_cpu::mbarrier_wait(barrier, parity, where);
}

inline void cluster_arrive() { cuda_on_cpu::arrive_at_cluster_barrier(); }

inline void cluster_wait(std::source_location where = std::source_location::current()) {
  cuda_on_cpu::wait_at_cluster_barrier(where);
}

inline void cluster_sync(std::source_location where = std::source_location::current()) {
  cluster_arrive();
  cluster_wait(where);
}

inline uint32_t cluster_rank() { return cuda_on_cpu::running_block(); }

// Fibers have as many registers as they like.
template <int kRegisters>
void give_up_registers() {}

template <int kRegisters>
void take_registers() {}

}  // namespace trine
