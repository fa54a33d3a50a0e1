#include "driver.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <vector>

#include "emulator.h"

namespace cuda_on_cpu {
namespace {

constexpr unsigned char kUnwritten = 0xff;

struct Extent {
  const char* name;
  const unsigned char *begin, *end, *mapped_begin, *mapped_end;
};
std::vector<Extent> extents;

void report_fault(int, siginfo_t* info, void*) {
  const auto* at = static_cast<const unsigned char*>(info->si_addr);
  for (const Extent& e : extents)
    if (at >= e.mapped_begin && at < e.mapped_end) {
      const bool before = at < e.begin;
      fail("access outside of %s (%td bytes): %td bytes %s", e.name, e.end - e.begin,
           before ? e.begin - at : at - e.end, before ? "before its begin" : "behind its end");
    }
  fail("access to %p, outside of every buffer and far from all", info->si_addr);
}

// On a stack of its own: the fault may be that a thread's stack is full.
void watch_faults() {
  static unsigned char handler_stack[64 << 10];
  stack_t stack = {};
  stack.ss_sp = handler_stack;
  stack.ss_size = sizeof handler_stack;
  sigaltstack(&stack, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = report_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}

void read_exactly(void* to, std::size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) fail("the input ends too early");
}

}  // namespace

GuardedBuffer::GuardedBuffer(const char* name, std::size_t bytes, std::size_t alignment)
    : name_(name), bytes_(bytes) {
  static const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t usable = (bytes / page + 1) * page;
  mapped_bytes_ = usable + 2 * page;
  void* memory = mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mapped_ = static_cast<unsigned char*>(memory);
  if (memory == MAP_FAILED || mprotect(mapped_ + page, usable, PROT_READ | PROT_WRITE) != 0)
    fail("no memory for %s", name);
  std::memset(mapped_ + page, kUnwritten, usable);
  data_ = mapped_ + page + (usable - bytes) / alignment * alignment;
  extents.push_back({name, data_, data_ + bytes, mapped_, mapped_ + mapped_bytes_});
  watch_faults();
}

GuardedBuffer::~GuardedBuffer() {
  std::erase_if(extents, [this](const Extent& e) { return e.begin == data_; });
  munmap(mapped_, mapped_bytes_);
}

void GuardedBuffer::read() { read_exactly(data_, bytes_); }

void GuardedBuffer::check_not_overrun() const {
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  for (const unsigned char* at = mapped_ + page; at < mapped_ + mapped_bytes_ - page; ++at)
    if ((at < data_ || at >= data_ + bytes_) && *at != kUnwritten)
      fail("%s (%zu bytes) was overrun: a write %td bytes from its begin", name_, bytes_,
           at - data_);
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
