#include "async_copies.h"

#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "emulator.h"
#include "shared_memory.h"

namespace cuda_on_cpu {
namespace {

constexpr int kTileRowBytes = 128, kUnitBytes = 16;
constexpr int kMostBarriers = 16, kMostArrivals = (1 << 20) - 1;

// The works that a thread has started, in groups; a wait does all but the last groups.
class Groups {
 public:
  void add(std::function<void()> work) { open_.push_back(std::move(work)); }
  void commit() { closed_.push_back(std::move(open_)), open_.clear(); }
  void finish_all_but(unsigned pending) {
    for (; closed_.size() > pending; closed_.pop_front())
      for (const auto& work : closed_.front()) work();
  }
  bool empty() const {
    for (const auto& group : closed_)
      if (!group.empty()) return false;
    return open_.empty();
  }

 private:
  using Works = std::vector<std::function<void()>>;
  Works open_;
  std::deque<Works> closed_;
};

struct Mbarrier {
  int arrivals, pending;
  int64_t bytes = 0;  // announced and not yet landed; below zero while they are early
  uint64_t phase = 0;
  unsigned thread;  // that initialised it
  bool shown = false;

  void end_phase_if_complete() {
    if (pending != 0 || bytes != 0) return;
    pending = arrivals;
    ++phase;
  }
};

struct NamedBarrier {
  int threads = 0, arrived = 0;
  uint64_t passed = 0;
};

using Place = std::pair<unsigned, uint32_t>;  // block and shared address

std::vector<Groups> copies, stores;  // of each thread
std::map<Place, Mbarrier> mbarriers;
std::map<std::pair<unsigned, int>, NamedBarrier> named_barriers;  // of block and id
std::map<unsigned, unsigned> returned;                            // threads of each block that have

bool has_ended(unsigned block) { return returned[block] == blockDim.x * blockDim.y * blockDim.z; }

Mbarrier& mbarrier_at(uint32_t address, const char* operation, unsigned block) {
  constexpr uint32_t kRank = 24;
  const uint32_t offset = address & ((1u << kRank) - 1);
  if (address >> kRank != 0) block = (address >> kRank) - 1;
  if (has_ended(block)) fail("%s in block %u of the cluster, which has ended", operation, block);
  at_shared(View::threads, block, offset, sizeof(uint64_t), sizeof(uint64_t), operation);
  const auto found = mbarriers.find({block, offset});
  if (found == mbarriers.end())
    fail("%s at shared address %#x: no mbarrier was initialised there", operation, offset);
  return found->second;
}

Mbarrier& own_mbarrier(uint32_t address, const char* operation) {
  return mbarrier_at(address, operation, running_block());
}

void arrive(Mbarrier& barrier, const char* operation) {
  if (barrier.pending == 0)
    fail("%s: more than the %d arrivals that the mbarrier was initialised with", operation,
         barrier.arrivals);
  --barrier.pending;
  barrier.end_phase_if_complete();
}

NamedBarrier& arrive_named(int id, int threads, const char* operation) {
  if (id < 0 || id >= kMostBarriers || threads <= 0 || threads % kLanes != 0)
    fail("%s: no GPU has barrier %d of %d threads", operation, id, threads);
  NamedBarrier& barrier = named_barriers[{running_block(), id}];
  if (barrier.arrived > 0 && barrier.threads != threads)
    fail("%s: barrier %d is met by %d threads here and by %d elsewhere", operation, id, threads,
         barrier.threads);
  barrier.threads = threads;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.passed;
  }
  return barrier;
}

// PTX ISA, "Swizzling modes", 128B: address bits 4 to 6 change by bits 7 to 9.
uint32_t swizzle_128(uint32_t address) { return address ^ ((address >> 7 & 7u) << 4); }

// Visits the units of 16 bytes of a box: global address or null, how many of its bytes lie within
// the matrix, and the shared address.
void for_each_unit(const TensorMap& map, int x, int y, uint32_t tile,
                   const std::function<void(unsigned char*, int, uint32_t)>& visit) {
  for (int row = 0; row < map.box_rows; ++row)
    for (int byte = 0; byte < map.box_bytes; byte += kUnitBytes) {
      const int64_t at = int64_t(x) + byte, line = int64_t(y) + row;
      const bool inside = line >= 0 && line < map.rows && at >= 0 && at < map.width;
      const int count = inside ? int(std::min<int64_t>(kUnitBytes, map.width - at)) : 0;
      const uint32_t to = tile + uint32_t(row * map.box_bytes + byte);
      visit(inside ? map.data + line * map.row_bytes + at : nullptr, count,
            map.box_bytes == kTileRowBytes ? swizzle_128(to) : to);
    }
}

void check_tile(const TensorMap& map, int x, uint32_t tile, const char* operation) {
  if (reinterpret_cast<uintptr_t>(map.data) % kUnitBytes != 0 || map.row_bytes % kUnitBytes != 0 ||
      map.box_rows < 1 || map.box_rows > 256 || map.rows < 1 || map.width < 1 ||
      map.box_bytes < 1 || map.box_bytes > kTileRowBytes || map.box_bytes % kUnitBytes != 0)
    fail("%s: no driver makes such a tensor map", operation);
  if (x % kUnitBytes != 0) fail("%s: the tests' tiles begin at whole units of 16 bytes", operation);
  at_shared(View::threads, running_block(), tile, std::size_t(map.bytes()),
            map.box_bytes == kTileRowBytes ? 1024 : 128, operation);
}

void land_tile(unsigned block, uint32_t to, const TensorMap& map, int x, int y, uint32_t barrier) {
  if (has_ended(block)) fail("a tile lands in block %u of the cluster, which has ended", block);
  for_each_unit(map, x, y, to, [&](const unsigned char* from, int count, uint32_t unit) {
    unsigned char bytes[kUnitBytes] = {};
    if (count > 0) std::memcpy(bytes, from, std::size_t(count));
    for (View view : {View::threads, View::async_units})
      std::memcpy(at_shared(view, block, unit, kUnitBytes, kUnitBytes, "load_tile"), bytes,
                  kUnitBytes);
  });
  Mbarrier& signalled = mbarrier_at(barrier, "load_tile", block);
  signalled.bytes -= map.bytes();
  signalled.end_phase_if_complete();
}

}  // namespace

void copy_async(uint32_t to, const void* from, int bytes, bool valid) {
  const unsigned block = running_block();
  const auto size = std::size_t(bytes);
  unsigned char* target = at_shared(View::threads, block, to, size, size, "copy_async");
  if (valid && reinterpret_cast<uintptr_t>(from) % size != 0)
    fail("copy_async from %p is not aligned to its size", from);
  poison(block, to, size);
  copies[running_thread()].add([=] {
    if (valid)
      std::memcpy(target, from, size);
    else
      std::memset(target, 0, size);
  });
}

void copy_async_commit() { copies[running_thread()].commit(); }
void copy_async_wait(unsigned pending) { copies[running_thread()].finish_all_but(pending); }

void named_barrier_sync(int id, int threads, std::source_location where) {
  const NamedBarrier& barrier = named_barriers[{running_block(), id}];
  const uint64_t passed = barrier.passed;
  arrive_named(id, threads, "named_barrier_sync");
  wait_until("named_barrier_sync " + std::to_string(id), where,
             [&barrier, passed] { return barrier.passed != passed; });
}

void named_barrier_arrive(int id, int threads) {
  arrive_named(id, threads, "named_barrier_arrive");
}

void mbarrier_init(uint32_t barrier, int arrivals) {
  if (arrivals < 1 || arrivals > kMostArrivals)
    fail("mbarrier_init: no mbarrier counts %d arrivals", arrivals);
  at_shared(View::threads, running_block(), barrier, sizeof(uint64_t), sizeof(uint64_t),
            "mbarrier_init");
  mbarriers[{running_block(), barrier}] = {
      .arrivals = arrivals, .pending = arrivals, .thread = running_thread()};
}

void fence_mbarrier_init() {
  for (auto& [place, barrier] : mbarriers)
    if (barrier.thread == running_thread()) barrier.shown = true;
}

void mbarrier_arrive(uint32_t barrier) {
  arrive(own_mbarrier(barrier, "mbarrier_arrive"), "mbarrier_arrive");
}

void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  Mbarrier& own = own_mbarrier(barrier, "mbarrier_arrive_expect");
  own.bytes += bytes;
  arrive(own, "mbarrier_arrive_expect");
}

void mbarrier_wait(uint32_t barrier, uint32_t parity, std::source_location where) {
  if (parity > 1) fail("mbarrier_wait: a parity is 0 or 1, not %u", parity);
  const Mbarrier& own = own_mbarrier(barrier, "mbarrier_wait");
  char operation[64];
  std::snprintf(operation, sizeof operation, "mbarrier_wait for parity %u of %#x", parity, barrier);
  wait_until(operation, where, [&own, parity] { return (own.phase & 1) != parity; });
}

void load_tile(uint32_t to, const TensorMap& map, int x, int y, uint32_t barrier, uint16_t ranks) {
  check_tile(map, x, to, "load_tile");
  const unsigned own = running_block();
  const unsigned blocks = cluster_threads() / (blockDim.x * blockDim.y * blockDim.z);
  if (ranks >> blocks != 0) fail("load_tile: ranks %#x in a cluster of %u blocks", ranks, blocks);
  if (ranks == 0) ranks = uint16_t(1u << own);
  if (!own_mbarrier(barrier, "load_tile").shown)
    fail("load_tile: its mbarrier was not shown to the copy engine by fence_mbarrier_init");
  for (unsigned block = 0; block < blocks; ++block)
    if (ranks >> block & 1u) {
      poison(block, to, std::size_t(map.bytes()));
      do_later([=] { land_tile(block, to, map, x, y, barrier); });
    }
}

void store_tile(const TensorMap& map, int x, int y, uint32_t from) {
  check_tile(map, x, from, "store_tile");
  const unsigned block = running_block();
  stores[running_thread()].add([=] {
    for_each_unit(map, x, y, from, [&](unsigned char* to, int count, uint32_t unit) {
      if (count > 0)
        std::memcpy(to,
                    at_shared(View::async_units, block, unit, kUnitBytes, kUnitBytes, "store_tile"),
                    std::size_t(count));
    });
  });
}

void store_tile_commit() { stores[running_thread()].commit(); }
void store_tile_wait_read(unsigned pending) { stores[running_thread()].finish_all_but(pending); }

void begin_copies(unsigned threads) {
  copies.assign(threads, {});
  stores.assign(threads, {});
  mbarriers.clear();
  named_barriers.clear();
  returned.clear();
}

void check_copies_of_returning_thread() {
  if (!stores[running_thread()].empty())
    fail("the thread returns before store_tile has read shared memory");
  ++returned[running_block()];
}

}  // namespace cuda_on_cpu
