// The read kernel, for vectors of any width: each instruction set compiles its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/pages.h"

namespace trine {
namespace {

constexpr int64_t kLine = 64;

typedef uint64_t Word __attribute__((may_alias));
typedef uint64_t Vector32 __attribute__((vector_size(32), aligned(8), may_alias));
typedef uint64_t Vector64 __attribute__((vector_size(64), aligned(8), may_alias));

// Reads [data, data + bytes) as `streams` runs side by side, and asks for the line `ahead` bytes
// further on in each run (0: leaves that to the processor). Long runs have their pages touched
// ahead, as the kernels do: without it memory seems a quarter slower than it can be.
template <class Vector, int streams>
uint64_t read_runs(const char* data, int64_t bytes, int64_t ahead) {
  // Additions take one cycle and no processor does more than four a cycle.
  constexpr int kSums = 4;
  constexpr int64_t kVectors = kLine / sizeof(Vector);
  Vector sums[kSums] = {};
  const int64_t run = bytes / streams / kLine * kLine;
  for (int64_t at = 0; at < run; at += kLine) {
    const int64_t next = at + kTouchedBytes;
    if (at % kTouchedBytes == 0 && next < run)
      for (int stream = 0; stream < streams; ++stream)
        touch_pages(data + stream * run + next, std::min(kTouchedBytes, run - next));
    for (int stream = 0; stream < streams; ++stream) {
      const char* line = data + stream * run + at;
      if (ahead > 0) __builtin_prefetch(line + ahead);
      for (int64_t i = 0; i < kVectors; ++i)
        sums[(stream * kVectors + i) % kSums] += reinterpret_cast<const Vector*>(line)[i];
    }
  }
  sums[0] += sums[1] + sums[2] + sums[3];
  uint64_t words[sizeof(Vector) / sizeof(uint64_t)], total = 0;
  std::memcpy(words, &sums[0], sizeof(Vector));
  for (uint64_t word : words) total += word;
  return total;
}

template <class Vector>
uint64_t read_streams(const void* data, int64_t bytes, int streams, int64_t ahead) {
  const char* start = static_cast<const char*>(data);
  switch (streams) {
    case 2:
      return read_runs<Vector, 2>(start, bytes, ahead);
    case 4:
      return read_runs<Vector, 4>(start, bytes, ahead);
    case 8:
      return read_runs<Vector, 8>(start, bytes, ahead);
    case 16:
      return read_runs<Vector, 16>(start, bytes, ahead);
    default:
      return read_runs<Vector, 1>(start, bytes, ahead);
  }
}

}  // namespace
}  // namespace trine
