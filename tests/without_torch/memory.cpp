#include "memory.h"

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <new>

namespace without_torch {
Memory::Memory(std::size_t bytes, std::size_t alignment) {
  const std::size_t page = sysconf(_SC_PAGESIZE);
  const std::size_t inside = (bytes + page - 1) / page * page;
  mapped_bytes_ = inside + 2 * page;
  void* mapped = mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  // qemu fails where there is nothing to protect.
  if (inside > 0 &&
      mprotect(static_cast<char*>(mapped) + page, inside, PROT_READ | PROT_WRITE) != 0)
    throw std::bad_alloc();
  mapped_ = static_cast<char*>(mapped);
  char *begin = mapped_ + page, *end = begin + inside;
  std::memset(begin, 0xff, inside);
  data_ = end - (bytes + alignment - 1) / alignment * alignment;
  ASAN_POISON_MEMORY_REGION(begin, data_ - begin);
  ASAN_POISON_MEMORY_REGION(data_ + bytes, end - (data_ + bytes));
}

Memory::~Memory() {
  ASAN_UNPOISON_MEMORY_REGION(mapped_, mapped_bytes_);
  munmap(mapped_, mapped_bytes_);
}

}  // namespace without_torch
