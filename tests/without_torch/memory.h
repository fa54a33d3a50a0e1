// Memory that ends at an unmapped page and begins behind another.
//
// It ends at the page exactly where `bytes` is a multiple of `alignment`. Bytes left between are
// poisoned for AddressSanitizer; all are 0xff, NaN in every floating type, until they are written.
#pragma once

#include <cstddef>

namespace without_torch {

class Memory {
 public:
  Memory(std::size_t bytes, std::size_t alignment);  // alignment is a power of two
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* data() const { return data_; }

 private:
  char* mapped_;
  std::size_t mapped_bytes_;
  char* data_;
};

}  // namespace without_torch
