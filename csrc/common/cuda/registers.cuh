// What the compiler is to keep in registers, and what not.
#pragma once

#include <cstdint>

namespace trine {

// Leaves `word` as it is, but the compiler does not know that: what it made of the word before, it
// makes anew instead of keeping it.
__device__ __forceinline__ void forget_origin(uint32_t& word) { asm volatile("" : "+r"(word)); }

}  // namespace trine
