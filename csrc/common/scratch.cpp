#include "common/scratch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

namespace trine {

std::atomic<bool> poison_scratch{false};

namespace {

constexpr int64_t kAlignment = 64;
// Larger blocks are freed instead of kept, so that one large call does not hold memory for ever.
constexpr int64_t kKeepBytes = 1 << 20;  // fits the L2 cache of the machines we aim at
constexpr std::size_t kKeepBlocks = 4;   // input, bias, panel and one to spare

// The blocks that this thread may reuse.
struct IdleBlocks : std::vector<ScratchBlock> {
  IdleBlocks() { reserve(kKeepBlocks); }  // so that giving a block back never allocates
  ~IdleBlocks() {
    for (const ScratchBlock& block : *this) std::free(block.memory);
  }
};

IdleBlocks& idle_blocks() {
  thread_local IdleBlocks blocks;
  return blocks;
}

bool smaller(const ScratchBlock& a, const ScratchBlock& b) { return a.bytes < b.bytes; }

ScratchBlock take(int64_t bytes) {
  // The smallest that serves: a small request must not take the only large block.
  IdleBlocks& idle = idle_blocks();
  auto found = idle.end();
  for (auto block = idle.begin(); block != idle.end(); ++block)
    if (block->bytes >= bytes && (found == idle.end() || smaller(*block, *found))) found = block;
  if (found != idle.end()) {
    const ScratchBlock block = *found;
    idle.erase(found);
    return block;
  }
  const int64_t rounded = (bytes / kAlignment + 1) * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, static_cast<std::size_t>(rounded));
  if (memory == nullptr) throw std::bad_alloc();
  return {memory, rounded};
}

void give_back(ScratchBlock block) {
  IdleBlocks& idle = idle_blocks();
  if (block.bytes > kKeepBytes) return std::free(block.memory);
  if (idle.size() == kKeepBlocks) {  // the smallest goes: it is the cheapest to get again
    const auto smallest = std::min_element(idle.begin(), idle.end(), smaller);
    if (smaller(*smallest, block)) std::swap(*smallest, block);
    return std::free(block.memory);
  }
  idle.push_back(block);
}

}  // namespace

Scratch::Scratch(int64_t bytes) : block_(take(bytes)) {
  if (poison_scratch.load(std::memory_order_relaxed)) [[unlikely]]
    std::memset(block_.memory, 0xa5, static_cast<std::size_t>(block_.bytes));
}

Scratch::~Scratch() { give_back(block_); }

}  // namespace trine
