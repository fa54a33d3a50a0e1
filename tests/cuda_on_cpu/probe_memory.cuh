// Twin of tests/cuda_probes/device/probe_memory.cuh.
#pragma once

#include <cstring>

#include "driver.h"

class ProbeMemory {
 public:
  explicit ProbeMemory(std::size_t bytes) : buffer_("a probe's memory", bytes, 16) {}
  template <class T>
  T* data() const {
    return buffer_.data<T>();
  }
  void print() const { buffer_.write(); }

 private:
  cuda_on_cpu::GuardedBuffer buffer_;
};
