// What tests/cuda_on_cpu/driver.h declares, on a GPU: the programs that run an op's kernels on a
// case from standard input run there, too, compiled by nvcc with this in the emulation's place.
#include "driver.h"

#include "probe_memory.cuh"

namespace cuda_on_cpu {
namespace {

// Watched on either side of a buffer.
constexpr std::size_t kGuard = 4096;
constexpr unsigned char kUnwritten = 0xff;

void read_exactly(void* to, std::size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) == bytes) return;
  std::fprintf(stderr, "the case ends early\n");
  std::exit(2);
}

}  // namespace

// Memory that both see: a kernel's buffers are as small as a case.
GuardedBuffer::GuardedBuffer(const char* name, std::size_t bytes, std::size_t)
    : name_(name), bytes_(bytes), mapped_bytes_(bytes + 2 * kGuard) {
  void* memory = nullptr;
  check_cuda(cudaMallocManaged(&memory, mapped_bytes_));
  mapped_ = static_cast<unsigned char*>(memory);
  data_ = mapped_ + kGuard;
  std::memset(mapped_, kUnwritten, mapped_bytes_);
}

GuardedBuffer::~GuardedBuffer() { cudaFree(mapped_); }

void GuardedBuffer::read() { read_exactly(data_, bytes_); }

void GuardedBuffer::check_not_overrun() const {
  check_cuda(cudaDeviceSynchronize());
  for (const unsigned char* at = mapped_; at < mapped_ + mapped_bytes_; ++at)
    if ((at < data_ || at >= data_ + bytes_) && *at != kUnwritten) {
      std::fprintf(stderr, "%s (%zu bytes) was overrun: a write %td bytes from its begin\n", name_,
                   bytes_, at - data_);
      std::exit(3);
    }
}

void GuardedBuffer::write() const {
  check_not_overrun();
  std::fwrite(data_, 1, bytes_, stdout);
}

int64_t read_number() {
  int64_t number;
  read_exactly(&number, sizeof number);
  return number;
}

}  // namespace cuda_on_cpu
