// Twin of csrc/common/cuda/async_copy.cuh.
#pragma once

#include "async_copies.h"
#include "common/cuda/device.cuh"

namespace trine {

using cuda_on_cpu::copy_async_commit;

template <int kBytes = 16>
void copy_async(SharedAddress to, const void* from, bool valid) {
  cuda_on_cpu::copy_async(to, from, kBytes, valid);
}

template <int kPending>
void copy_async_wait() {
  cuda_on_cpu::copy_async_wait(kPending);
}

}  // namespace trine
