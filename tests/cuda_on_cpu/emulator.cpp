#include "emulator.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "async_copies.h"
#include "matrix_units.h"
#include "shared_memory.h"

namespace cuda_on_cpu {
namespace {

constexpr std::size_t kStackBytes = 256 << 10;  // unoptimised kernels keep their fragments there
constexpr unsigned kMostThreads = 1024;         // of a block, on every GPU
constexpr unsigned kMostBlocks = 8;             // of a cluster that every GPU can start
constexpr unsigned kNobody = ~0u;
constexpr unsigned kStepsPerOrder = 256;  // on average: often enough to change within a block
constexpr unsigned kStepsPerDeed = 16;    // on average, between two works of do_later

// Where a thread waits, and with whom: only threads that agree on all of it meet.
struct Meeting {
  std::string operation;
  std::source_location where;
  int warp;  // kBlock: all of the block; kAlone: for a condition
  uint32_t mask;

  bool operator==(const Meeting& other) const {
    return operation == other.operation && where.line() == other.where.line() &&
           std::strcmp(where.file_name(), other.where.file_name()) == 0 && warp == other.warp &&
           mask == other.mask;
  }
};
constexpr int kBlock = -1, kAlone = -2;

enum class State { ready, waiting, finished };

struct Thread {
  State state;
  Meeting meeting;              // while waiting
  std::function<bool()> ready;  // while waiting alone
  void* post;
  bool has_arrived;     // at the cluster's barrier that has not opened yet
  unsigned arrived_at;  // how many had opened before the one where it arrived last
  ucontext_t context;
};

struct Block {
  Index3 index;
  unsigned finished = 0, at_barrier = 0;
};

uint64_t seed_in_force = 0;
std::mt19937_64 random_order;

const std::function<void()>* thread_main;
std::vector<Thread> threads;  // of the running cluster, block after block
std::vector<Block> blocks;    // the same
unsigned block_threads;
unsigned running = kNobody;
unsigned expected_at_cluster_barrier;  // threads that have neither arrived nor returned
unsigned cluster_barriers_passed;
std::vector<std::function<void()>> later;
ucontext_t scheduler;

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
  check_copies_of_returning_thread();
  threads[running].state = State::finished;
  ++blocks[running_block()].finished;
  if (!threads[running].has_arrived) --expected_at_cluster_barrier;
  back_to_scheduler();
}

void start_thread(unsigned index) {
  Thread& thread = threads[index];
  thread.state = State::ready;
  thread.has_arrived = false;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = stack_of(index);
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, enter_thread, 0);
}

// The threads that wait at `meeting` in the block of `thread`.
std::vector<unsigned> waiting_for(const Meeting& meeting, unsigned thread) {
  const unsigned block_begin = block_of(thread) * block_threads;
  const unsigned block_end = block_begin + block_threads;
  const unsigned begin = meeting.warp < 0 ? block_begin : unsigned(meeting.warp * kLanes);
  const unsigned end = meeting.warp < 0 ? block_end : std::min(begin + kLanes, block_end);
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
void open_barrier_if_all_wait(unsigned b) {
  Block& block = blocks[b];
  if (block.at_barrier == 0 || block.at_barrier + block.finished < block_threads) return;
  for (unsigned t = b * block_threads; t < (b + 1) * block_threads; ++t)
    if (threads[t].state == State::waiting && threads[t].meeting.warp == kBlock) {
      const std::vector<unsigned> here = waiting_for(threads[t].meeting, t);
      if (here.size() != block.at_barrier) return;  // others are at another barrier: a deadlock
      block.at_barrier = 0;
      return wake(here);
    }
}

bool can_go_on(unsigned t) {
  Thread& thread = threads[t];
  if (thread.state == State::waiting && thread.meeting.warp == kAlone && thread.ready())
    thread.state = State::ready;
  return thread.state == State::ready;
}

void do_one_deed() {
  std::swap(later[random_order() % later.size()], later.back());
  const std::function<void()> work = std::move(later.back());
  later.pop_back();
  work();
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
    const std::vector<unsigned> here = waiting_for(thread.meeting, t);
    if (here.front() != t) continue;
    report += "\n  thread " + ranges(here) + ": waits in " + thread.meeting.operation + " at " +
              thread.meeting.where.file_name() + ":" + std::to_string(thread.meeting.where.line());
    if (thread.meeting.warp >= 0) {
      char mask[32];
      std::snprintf(mask, sizeof mask, " (mask %#010x)", thread.meeting.mask);
      report += mask;
    }
  }
  if (!returned.empty()) report += "\n  thread " + ranges(returned) + ": returned";
  running = kNobody;
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
void run_cluster(std::size_t dynamic_bytes) {
  const unsigned count = unsigned(blocks.size()) * block_threads;
  threads.resize(count);
  expected_at_cluster_barrier = count;
  cluster_barriers_passed = 0;
  later.clear();
  begin_shared_memory(unsigned(blocks.size()), dynamic_bytes);
  begin_copies(count);
  begin_matrix_units(count);
  for (unsigned t = 0; t < count; ++t) start_thread(t);
  std::vector<unsigned> order;
  draw_priorities(order);
  for (unsigned finished = 0; finished < count;) {
    if (random_order() % kStepsPerOrder == 0) draw_priorities(order);
    if (!later.empty() && random_order() % kStepsPerDeed == 0) do_one_deed();
    const auto next = std::find_if(order.begin(), order.end(), can_go_on);
    if (next == order.end()) {
      if (later.empty()) fail_deadlock();
      do_one_deed();
      continue;
    }
    running = *next;
    const unsigned b = running_block(), t = running % block_threads;
    blockIdx = blocks[b].index;
    threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
    swapcontext(&scheduler, &threads[running].context);
    finished += threads[running].state == State::finished;
    open_barrier_if_all_wait(b);
  }
  running = kNobody;
  while (!later.empty()) do_one_deed();
  check_shared_memory();
}

}  // namespace

void fail(const char* format, ...) {
  std::fputs("cuda_on_cpu: ", stderr);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n  in block (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z);
  if (running != kNobody) std::fprintf(stderr, ", thread %u", running % block_threads);
  std::fprintf(stderr, "; schedule of seed %llu\n", static_cast<unsigned long long>(seed_in_force));
  std::fflush(stderr);
  _exit(3);
}

void set_seed(uint64_t seed) {
  seed_in_force = seed;
  random_order.seed(seed);
}

void run_grid(const Grid& grid, const std::function<void()>& main) {
  const Index3 count = grid.blocks, block = grid.threads;
  block_threads = block.x * block.y * block.z;
  if (block_threads == 0 || block_threads > kMostThreads || count.x > 0x7fffffffu ||
      count.x * count.y * count.z == 0 || count.y > 65535 || count.z > 65535)
    fail("no GPU takes a grid of (%u, %u, %u) blocks of (%u, %u, %u) threads", count.x, count.y,
         count.z, block.x, block.y, block.z);
  if (grid.cluster == 0 || grid.cluster > kMostBlocks || count.x % grid.cluster != 0 ||
      (grid.cluster > 1 && block_threads % kLanes != 0))
    fail("no GPU starts clusters of %u blocks of %u threads in a grid of %u blocks", grid.cluster,
         block_threads, count.x);
  gridDim = count;
  blockDim = block;
  thread_main = &main;
  // A GPU may start blocks in any order.
  std::vector<Index3> firsts;
  for (unsigned z = 0; z < count.z; ++z)
    for (unsigned y = 0; y < count.y; ++y)
      for (unsigned x = 0; x < count.x; x += grid.cluster) firsts.push_back({x, y, z});
  std::shuffle(firsts.begin(), firsts.end(), random_order);
  for (const Index3& first : firsts) {
    blocks.clear();
    for (unsigned rank = 0; rank < grid.cluster; ++rank)
      blocks.push_back({{first.x + rank, first.y, first.z}});
    run_cluster(grid.dynamic_bytes);
  }
}

unsigned running_thread() { return running; }
unsigned running_block() { return block_of(running); }
unsigned cluster_threads() { return unsigned(threads.size()); }
unsigned block_of(unsigned thread) { return thread / block_threads; }

void block_barrier(std::source_location where) {
  wait_at({"__syncthreads", where, kBlock, 0}, nullptr);
  ++blocks[running_block()].at_barrier;
  back_to_scheduler();
}

void wait_until(const std::string& operation, std::source_location where,
                std::function<bool()> ready) {
  wait_at({operation, where, kAlone, 0}, nullptr);
  threads[running].ready = std::move(ready);
  back_to_scheduler();
}

void arrive_at_cluster_barrier() {
  Thread& thread = threads[running];
  if (thread.has_arrived) fail("a thread arrives twice at a barrier of the cluster");
  thread.has_arrived = true;
  thread.arrived_at = cluster_barriers_passed;
  --expected_at_cluster_barrier;
}

void wait_at_cluster_barrier(std::source_location where) {
  wait_until("a barrier of the cluster", where, [passed = threads[running].arrived_at] {
    if (cluster_barriers_passed != passed) return true;
    if (expected_at_cluster_barrier > 0) return false;
    for (Thread& thread : threads) {
      thread.has_arrived = false;
      expected_at_cluster_barrier += thread.state != State::finished;
    }
    ++cluster_barriers_passed;
    return true;
  });
}

bool has_returned(unsigned block) { return blocks[block].finished == block_threads; }

void do_later(std::function<void()> work) { later.push_back(std::move(work)); }

void meet_lanes(const char* operation, uint32_t mask, void* post, std::source_location where,
                const std::function<void(const Posts&)>& complete) {
  const int warp = int(running / kLanes);
  const unsigned lane = running % kLanes;
  if ((mask >> lane & 1u) == 0)
    fail("lane %u calls %s at %s:%u with the mask %#010x, which does not name it", lane, operation,
         where.file_name(), unsigned(where.line()), mask);
  const Meeting meeting{operation, where, warp, mask};
  wait_at(meeting, post);
  const std::vector<unsigned> here = waiting_for(meeting, running);
  if (int(here.size()) == __builtin_popcount(mask)) {
    Posts posts{};
    for (unsigned t : here) posts[t % kLanes] = threads[t].post;
    complete(posts);
    wake(here);
  }
  back_to_scheduler();
}

}  // namespace cuda_on_cpu
