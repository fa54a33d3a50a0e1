// Memory of a probe: written by its kernels, read by the host. Its twin under tests/cuda_on_cpu
// serves the emulation.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "common/cuda/device.cuh"

inline void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(3);
}

class ProbeMemory {
 public:
  explicit ProbeMemory(std::size_t bytes) : bytes_(bytes) {
    check_cuda(cudaMallocManaged(&data_, bytes));
    std::memset(data_, 0xff, bytes);
  }
  ~ProbeMemory() { cudaFree(data_); }
  template <class T>
  T* data() const {
    return static_cast<T*>(data_);
  }
  // After the kernels before it.
  void print() const {
    check_cuda(cudaDeviceSynchronize());
    std::fwrite(data_, 1, bytes_, stdout);
  }

 private:
  std::size_t bytes_;
  void* data_ = nullptr;
};
