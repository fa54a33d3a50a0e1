// Included before every source that ThreadSanitizer watches: it does not see masked stores, because
// to the compiler they are instructions, not assignments. Here each tells of itself.
//
// A store that is missing here shows: overlapping pieces of an op that uses it go unreported.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include <bit>
#include <cstddef>
#include <cstdint>

extern "C" void __tsan_write_range(void* begin, std::size_t bytes);

namespace {

template <class T>
[[maybe_unused]] inline T* tell_of_store(T* to, uint64_t mask, std::size_t element_bytes) {
  __tsan_write_range(to, std::bit_width(mask) * element_bytes);
  return to;
}

}  // namespace

// A macro's own name inside of it is the intrinsic.
#define _mm512_mask_storeu_ps(to, mask, value) \
  _mm512_mask_storeu_ps(tell_of_store(to, mask, 4), mask, value)
#define _mm256_mask_storeu_epi16(to, mask, value) \
  _mm256_mask_storeu_epi16(tell_of_store(to, mask, 2), mask, value)
#define _mm_mask_storeu_epi8(to, mask, value) \
  _mm_mask_storeu_epi8(tell_of_store(to, mask, 1), mask, value)
#define _mm256_maskstore_ps(to, mask, value)                                                     \
  _mm256_maskstore_ps(tell_of_store(to, _mm256_movemask_ps(_mm256_castsi256_ps(mask)), 4), mask, \
                      value)
#endif
