// Runs CUDA threads as fibers, one cluster of blocks after the other, in a random order.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

namespace cuda_on_cpu {

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

// Prints what is wrong, which thread ran, and the seed; ends the process with status 3.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void set_seed(uint64_t seed);

struct Grid {
  Index3 blocks, threads;
  std::size_t dynamic_bytes = 0;  // of shared memory, for each block
  unsigned cluster = 1;           // consecutive blocks that run together
};

// Calls `thread_main` once for each thread of each block, with threadIdx and blockIdx set.
void run_grid(const Grid& grid, const std::function<void()>& thread_main);

unsigned running_thread();   // counted through the blocks of the cluster
unsigned running_block();    // its rank in the cluster
unsigned cluster_threads();  // of all blocks of the cluster
unsigned block_of(unsigned thread);

// Waits for every thread of the block that has not returned.
void block_barrier(std::source_location where);

// The two steps of waiting for every thread of the cluster that has not returned.
void arrive_at_cluster_barrier();
void wait_at_cluster_barrier(std::source_location where);

// Whether all threads of this block of the cluster have.
bool has_returned(unsigned block);

// Waits until `ready()`, which others bring about; `operation` says for what in a deadlock's
// report.
void wait_until(const std::string& operation, std::source_location where,
                std::function<bool()> ready);

// Work that hardware does beside the threads: done at some later moment, at the latest when no
// thread can go on.
void do_later(std::function<void()> work);

inline constexpr int kLanes = 32;

// Waits for the lanes of `mask`, each of which brings a pointer; the last to come calls `complete`
// with those of all lanes (null outside the mask).
using Posts = std::array<void*, kLanes>;
void meet_lanes(const char* operation, uint32_t mask, void* post, std::source_location where,
                const std::function<void(const Posts&)>& complete);

// A warp operation: each lane of `mask` brings `input`, and gets result(inputs, lane), computed
// when all have come. `inputs[lane]` is null for lanes outside the mask.
template <class Input, class Result>
auto warp_collective(const char* operation, uint32_t mask, const Input& input, Result result,
                     std::source_location where) {
  using Inputs = std::array<const Input*, kLanes>;
  struct Post {
    Input input;
    decltype(result(Inputs{}, 0)) output;
  };
  Post mine{input, {}};
  meet_lanes(operation, mask, &mine, where, [&](const Posts& posts) {
    Inputs inputs{};
    for (int lane = 0; lane < kLanes; ++lane)
      if (posts[lane] != nullptr) inputs[lane] = &static_cast<Post*>(posts[lane])->input;
    for (int lane = 0; lane < kLanes; ++lane)
      if (posts[lane] != nullptr) static_cast<Post*>(posts[lane])->output = result(inputs, lane);
  });
  return mine.output;
}

}  // namespace cuda_on_cpu

// CUDA's own names, set before a thread goes on.
inline cuda_on_cpu::Index3 threadIdx, blockIdx, blockDim, gridDim;
