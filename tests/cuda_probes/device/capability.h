// Lets a GPU choose the kernels of an older one: included before every source of a case program.
#pragma once

#include "common/cuda/launch.cuh"

namespace trine {

inline int emulated_capability = 80;
inline int chosen_capability() { return emulated_capability; }

}  // namespace trine

#define compute_capability chosen_capability
