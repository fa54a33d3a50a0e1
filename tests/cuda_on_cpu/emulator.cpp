#include "emulator.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace cuda_on_cpu {
namespace {

constexpr std::size_t kStackBytes = 64 << 10;  // kernels keep little on the stack
constexpr unsigned kMostThreads = 1024;        // of a block, on every GPU
constexpr unsigned char kPoison = 0xa5;
constexpr std::size_t kCanaryBytes = 64;  // behind each shared array
constexpr unsigned kStepsPerOrder = 256;  // on average: often enough to change within a block

// Where a thread waits, and with whom: only threads that agree on all of it meet.
struct Meeting {
  const char* operation;
  std::source_location where;
  int warp;  // -1: the whole block
  uint32_t mask;

  bool operator==(const Meeting& other) const {
    return std::strcmp(operation, other.operation) == 0 && where.line() == other.where.line() &&
           std::strcmp(where.file_name(), other.where.file_name()) == 0 && warp == other.warp &&
           mask == other.mask;
  }
};

enum class State { ready, waiting, finished };

struct Thread {
  State state;
  Meeting meeting;  // while waiting
  void* post;
  ucontext_t context;
};

struct SharedArray {
  std::unique_ptr<unsigned char[]> memory;
  std::size_t bytes;
};

uint64_t seed_in_force = 0;
std::mt19937_64 random_order;

const std::function<void()>* thread_main;
std::vector<Thread> threads;  // of the running block
unsigned running = kMostThreads;
unsigned finished = 0, at_barrier = 0;
ucontext_t scheduler;
std::map<const void*, SharedArray> shared_arrays;

// A guard page below each stack turns an overflow into a fault.
char* stack_of(unsigned thread) {
  static const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  static std::vector<char*> stacks;
  while (stacks.size() <= thread) {
    void* memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0)
      fail("no memory for the stack of a thread");
    stacks.push_back(static_cast<char*>(memory) + page);
  }
  return stacks[thread];
}

void back_to_scheduler() { swapcontext(&threads[running].context, &scheduler); }

void enter_thread() {
  (*thread_main)();
  threads[running].state = State::finished;
  ++finished;
  back_to_scheduler();
}

void start_thread(unsigned index) {
  Thread& thread = threads[index];
  thread.state = State::ready;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = stack_of(index);
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, enter_thread, 0);
}

std::vector<unsigned> waiting_for(const Meeting& meeting) {
  const bool whole_block = meeting.warp < 0;
  const unsigned begin = whole_block ? 0 : unsigned(meeting.warp * kLanes);
  const unsigned count = unsigned(threads.size());
  const unsigned end = whole_block ? count : std::min(begin + kLanes, count);
  std::vector<unsigned> found;
  for (unsigned t = begin; t < end; ++t)
    if (threads[t].state == State::waiting && threads[t].meeting == meeting) found.push_back(t);
  return found;
}

void wake(const std::vector<unsigned>& met) {
  for (unsigned t : met) threads[t].state = State::ready;
}

void wait_at(const Meeting& meeting, void* post) {
  threads[running].state = State::waiting;
  threads[running].meeting = meeting;
  threads[running].post = post;
}

// A barrier waits for all but the finished threads, so the last obstacle may be a thread that
// returns.
void open_barrier_if_all_wait() {
  if (at_barrier == 0 || at_barrier + finished < threads.size()) return;
  for (const Thread& thread : threads)
    if (thread.state == State::waiting && thread.meeting.warp < 0) {
      const std::vector<unsigned> here = waiting_for(thread.meeting);
      if (here.size() != at_barrier) return;  // others are at another barrier: a deadlock
      at_barrier = 0;
      return wake(here);
    }
}

// "0-31, 40" from ascending numbers.
std::string ranges(const std::vector<unsigned>& numbers) {
  std::string text;
  for (std::size_t i = 0; i < numbers.size();) {
    std::size_t j = i;
    while (j + 1 < numbers.size() && numbers[j + 1] == numbers[j] + 1) ++j;
    text += (text.empty() ? "" : ", ") + std::to_string(numbers[i]);
    if (j > i) text += "-" + std::to_string(numbers[j]);
    i = j + 1;
  }
  return text;
}

[[noreturn]] void fail_deadlock() {
  std::string report;
  std::vector<unsigned> returned;
  for (unsigned t = 0; t < threads.size(); ++t) {
    const Thread& thread = threads[t];
    if (thread.state == State::finished) {
      returned.push_back(t);
      continue;
    }
    const std::vector<unsigned> here = waiting_for(thread.meeting);
    if (here.front() != t) continue;
    char line[512];
    std::snprintf(line, sizeof line, "\n  thread %s: waits in %s at %s:%u", ranges(here).c_str(),
                  thread.meeting.operation, thread.meeting.where.file_name(),
                  unsigned(thread.meeting.where.line()));
    report += line;
    if (thread.meeting.warp >= 0) {
      std::snprintf(line, sizeof line, " (mask %#010x)", thread.meeting.mask);
      report += line;
    }
  }
  if (!returned.empty()) report += "\n  thread " + ranges(returned) + ": returned";
  running = kMostThreads;
  fail("deadlock%s", report.c_str());
}

// The threads in a random order of warps, and of lanes within each warp.
void draw_priorities(std::vector<unsigned>& order) {
  const unsigned count = unsigned(threads.size()), warps = (count + kLanes - 1) / kLanes;
  std::vector<unsigned> warp_order(warps), lanes(kLanes);
  std::iota(warp_order.begin(), warp_order.end(), 0u);
  std::iota(lanes.begin(), lanes.end(), 0u);
  std::shuffle(warp_order.begin(), warp_order.end(), random_order);
  order.clear();
  for (unsigned warp : warp_order) {
    std::shuffle(lanes.begin(), lanes.end(), random_order);
    for (unsigned lane : lanes)
      if (warp * kLanes + lane < count) order.push_back(warp * kLanes + lane);
  }
}

// The first in the order who can go on does, up to its next meeting. So one warp runs as far ahead
// of the others as the barriers let it, which shows races that taking turns would hide (Burckhardt
// et al., "A Randomized Scheduler with Probabilistic Guarantees of Finding Bugs", 2010).
void run_block(unsigned thread_count) {
  threads.resize(thread_count);
  finished = at_barrier = 0;
  for (unsigned t = 0; t < thread_count; ++t) start_thread(t);
  std::vector<unsigned> order;
  draw_priorities(order);
  while (finished < thread_count) {
    if (random_order() % kStepsPerOrder == 0) draw_priorities(order);
    const auto next = std::find_if(order.begin(), order.end(),
                                   [](unsigned t) { return threads[t].state == State::ready; });
    if (next == order.end()) fail_deadlock();
    running = *next;
    threadIdx = {running % blockDim.x, running / blockDim.x % blockDim.y,
                 running / (blockDim.x * blockDim.y)};
    swapcontext(&scheduler, &threads[running].context);
    open_barrier_if_all_wait();
  }
  running = kMostThreads;
  for (const auto& [key, array] : shared_arrays)
    for (std::size_t i = 0; i < kCanaryBytes; ++i)
      if (array.memory[array.bytes + i] != kPoison)
        fail("a thread wrote %zu bytes behind the end of a shared array of %zu bytes", i,
             array.bytes);
}

}  // namespace

void fail(const char* format, ...) {
  std::fputs("cuda_on_cpu: ", stderr);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n  in block (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z);
  if (running < kMostThreads) std::fprintf(stderr, ", thread %u", running);
  std::fprintf(stderr, "; schedule of seed %llu\n", static_cast<unsigned long long>(seed_in_force));
  std::fflush(stderr);
  _exit(3);
}

void set_seed(uint64_t seed) {
  seed_in_force = seed;
  random_order.seed(seed);
}

void run_grid(Index3 grid, Index3 block, const std::function<void()>& main) {
  const unsigned thread_count = block.x * block.y * block.z;
  if (thread_count == 0 || thread_count > kMostThreads || grid.x > 0x7fffffffu ||
      grid.x * grid.y * grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    fail("no GPU takes a grid of (%u, %u, %u) blocks of (%u, %u, %u) threads", grid.x, grid.y,
         grid.z, block.x, block.y, block.z);
  gridDim = grid;
  blockDim = block;
  thread_main = &main;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        shared_arrays.clear();
        run_block(thread_count);
      }
}

void block_barrier(std::source_location where) {
  wait_at({"__syncthreads", where, -1, 0}, nullptr);
  ++at_barrier;
  back_to_scheduler();
}

void* shared_array(const void* key, std::size_t bytes) {
  SharedArray& array = shared_arrays[key];
  if (array.memory == nullptr) {
    array = {std::make_unique<unsigned char[]>(bytes + kCanaryBytes), bytes};
    std::memset(array.memory.get(), kPoison, bytes + kCanaryBytes);
  }
  return array.memory.get();
}

void meet_lanes(const char* operation, uint32_t mask, void* post, std::source_location where,
                const std::function<void(const Posts&)>& complete) {
  const int warp = int(running / kLanes);
  const unsigned lane = running % kLanes;
  if ((mask >> lane & 1u) == 0)
    fail("lane %u calls %s at %s:%u with the mask %#010x, which does not name it", lane, operation,
         where.file_name(), unsigned(where.line()), mask);
  const Meeting meeting{operation, where, warp, mask};
  wait_at(meeting, post);
  const std::vector<unsigned> here = waiting_for(meeting);
  if (int(here.size()) == __builtin_popcount(mask)) {
    Posts posts{};
    for (unsigned t : here) posts[t % kLanes] = threads[t].post;
    complete(posts);
    wake(here);
  }
  back_to_scheduler();
}

}  // namespace cuda_on_cpu
