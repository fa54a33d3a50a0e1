// Working memory of one op call, 64-byte aligned (a cache line and a zmm register), uninitialised.
//
// A block is given back to the thread that took it and reused by its next call, because a malloc
// of this size would page-fault every time. Large blocks are freed instead, so that one large call
// does not hold memory for ever.
//
// Nothing is inline but the cast: kernel files include this, and an inline function compiled there
// could be the copy that the linker keeps for all.
#pragma once

#include <atomic>
#include <cstdint>

#include "common/isa.h"

namespace trine {

// When set, every block is filled with 0xa5 as it is taken: tests show with it that no kernel
// reads what it did not write.
TRINE_API extern std::atomic<bool> poison_scratch;

class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  [[gnu::always_inline]] T* data() const {
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_;
  int64_t bytes_;
};

}  // namespace trine
