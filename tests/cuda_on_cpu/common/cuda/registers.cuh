// Twin of csrc/common/cuda/registers.cuh: a word stays as it is.
#pragma once

#include <cstdint>

namespace trine {

inline void forget_origin(uint32_t&) {}

}  // namespace trine
