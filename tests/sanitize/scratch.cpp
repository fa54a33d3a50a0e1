// Stands in for common/scratch.cpp where addresses are watched: every block is made for its use and
// ends where it was asked to end. (The real one hands blocks on, and rounds them up.)
#include "common/scratch.h"

#include "memory.h"

namespace trine {

std::atomic<bool> poison_scratch{false};

constexpr int64_t kHeader = 64;  // before the block: where its owner is found again

Scratch::Scratch(int64_t bytes) : bytes_(bytes) {
  auto* owner = new without_torch::Memory(kHeader + bytes, 64);
  *static_cast<without_torch::Memory**>(owner->data()) = owner;
  memory_ = static_cast<char*>(owner->data()) + kHeader;
}

Scratch::~Scratch() {
  delete *reinterpret_cast<without_torch::Memory**>(static_cast<char*>(memory_) - kHeader);
}

}  // namespace trine
