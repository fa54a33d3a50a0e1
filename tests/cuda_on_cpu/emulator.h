// Runs CUDA threads as fibers, one block after the other, in a random order.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

namespace cuda_on_cpu {

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

// Prints what is wrong, which thread ran, and the seed; ends the process with status 3.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void set_seed(uint64_t seed);

// Calls `thread_main` once for each thread of each block, with threadIdx and blockIdx set.
void run_grid(Index3 grid, Index3 block, const std::function<void()>& thread_main);

// Waits for every thread of the block that has not returned.
void block_barrier(std::source_location where);

// An array of the running block's shared memory: the same one for every thread that names the same
// `key`, filled with 0xa5 when the first does.
void* shared_array(const void* key, std::size_t bytes);

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
