// Working memory of one op call, 64-byte aligned (a cache line and a zmm register), uninitialised.
//
// A block is given back to the thread that took it and reused by its next call, because a malloc
// of this size would page-fault every time.
//
// Nothing here is inline: kernel files include this header, and a copy compiled with their
// instruction set must not end up serving the others.
#pragma once

#include <atomic>
#include <cstdint>

#include "common/isa.h"

namespace trine {

// When set, every block is filled with 0xa5 as it is taken: tests show with it that no kernel
// reads what it did not write.
TRINE_API extern std::atomic<bool> poison_scratch;

struct ScratchBlock {
  void* memory;
  int64_t bytes;
};

class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();

  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* data() const {
    return static_cast<T*>(block_.memory);
  }

 private:
  ScratchBlock block_;
};

}  // namespace trine
