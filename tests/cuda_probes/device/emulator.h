// What a case program needs of the emulator, on a GPU: nothing.
#pragma once

#include <cstdint>

namespace cuda_on_cpu {

inline void set_seed(uint64_t) {}  // the hardware has its own order

}  // namespace cuda_on_cpu
