// Working memory of one op call, 64-byte aligned (a cache line and a zmm register), uninitialised.
//
// A block is given back to the thread that took it and reused by its next call, because a malloc
// of this size would page-fault every time. Blocks over kKeepBytes are freed instead, so that one
// large call does not hold memory for ever.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "common/isa.h"

namespace trine {

// When set, every block is filled with 0xa5 as it is taken: tests show with it that no kernel
// reads what it did not write.
TRINE_API extern std::atomic<bool> poison_scratch;

class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    block_ = take(bytes);
    if (poison_scratch.load(std::memory_order_relaxed)) [[unlikely]]
      std::memset(block_.memory, 0xa5, static_cast<std::size_t>(block_.bytes));
  }

  ~Scratch() {
    auto& idle = idle_blocks();
    if (block_.bytes <= kKeepBytes && idle.size() < kKeepBlocks)
      idle.push_back(block_);
    else
      std::free(block_.memory);
  }

  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* data() const {
    return static_cast<T*>(block_.memory);
  }

 private:
  static constexpr int64_t kAlignment = 64;
  static constexpr int64_t kKeepBytes = 1 << 20;  // fits the L2 cache of the machines we aim at
  static constexpr std::size_t kKeepBlocks = 4;   // input, bias, panel and one to spare

  struct Block {
    void* memory;
    int64_t bytes;
  };

  struct IdleBlocks : std::vector<Block> {
    IdleBlocks() { reserve(kKeepBlocks); }  // so that giving a block back never allocates
    ~IdleBlocks() {
      for (const Block& block : *this) std::free(block.memory);
    }
  };

  static Block take(int64_t bytes) {
    auto& idle = idle_blocks();
    for (Block& block : idle)
      if (block.bytes >= bytes) {
        const Block found = block;
        block = idle.back();
        idle.pop_back();
        return found;
      }
    const int64_t rounded = (bytes / kAlignment + 1) * kAlignment;
    void* memory = std::aligned_alloc(kAlignment, static_cast<std::size_t>(rounded));
    if (memory == nullptr) throw std::bad_alloc();
    return {memory, rounded};
  }

  static IdleBlocks& idle_blocks() {
    thread_local IdleBlocks blocks;
    return blocks;
  }

  Block block_;
};

}  // namespace trine
