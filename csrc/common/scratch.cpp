#include "common/scratch.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

namespace trine {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kKeepBytes = 1 << 20;  // fits the L2 cache of the machines we aim at
constexpr std::size_t kKeepBlocks = 4;   // input, bias, panel and one to spare

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

IdleBlocks& idle_blocks() {
  thread_local IdleBlocks blocks;
  return blocks;
}

Block take(int64_t bytes) {
  IdleBlocks& idle = idle_blocks();
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

}  // namespace

std::atomic<bool> poison_scratch{false};

Scratch::Scratch(int64_t bytes) {
  const Block block = take(bytes);
  memory_ = block.memory;
  bytes_ = block.bytes;
  if (poison_scratch.load(std::memory_order_relaxed)) [[unlikely]]
    std::memset(memory_, 0xa5, static_cast<std::size_t>(bytes_));
}

Scratch::~Scratch() {
  IdleBlocks& idle = idle_blocks();
  if (bytes_ <= kKeepBytes && idle.size() < kKeepBlocks)
    idle.push_back({memory_, bytes_});
  else
    std::free(memory_);
}

}  // namespace trine
