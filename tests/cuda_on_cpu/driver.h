// What the programs of the ops share: memory with guards, and the cases on standard input.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_on_cpu {

// Stands in for device memory. It ends as close to an unmapped page as `alignment` (a power of two)
// allows, and begins behind another; the bytes left between are watched, and are 0xff, NaN in
// every floating type. So is its content, until it is written.
class GuardedBuffer {
 public:
  GuardedBuffer(const char* name, std::size_t bytes, std::size_t alignment);
  ~GuardedBuffer();
  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;

  template <class T>
  T* data() const {
    return reinterpret_cast<T*>(data_);
  }
  void read();                     // from standard input
  void write() const;              // to standard output, if nothing was written outside of it
  void check_not_overrun() const;  // fails if something was

 private:
  const char* name_;
  std::size_t bytes_, mapped_bytes_;
  unsigned char *mapped_, *data_;
};

int64_t read_number();  // int64 in the machine's byte order, from standard input

}  // namespace cuda_on_cpu
