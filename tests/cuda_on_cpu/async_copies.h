// Copies that run beside the threads, and the barriers that count them. What a copy will overwrite
// is poisoned when it starts, so that neither the old nor the new bytes can be read too early.
#pragma once

#include <cstdint>
#include <source_location>

namespace cuda_on_cpu {

// cp.async: lands when the thread waits for its group.
void copy_async(uint32_t to, const void* from, int bytes, bool valid);
void copy_async_commit();
void copy_async_wait(unsigned pending);

// Named barriers of the block.
void named_barrier_sync(int id, int threads, std::source_location where);
void named_barrier_arrive(int id, int threads);

// mbarriers. PTX ISA, "mbarrier": phases, pending arrivals, tx-count.
void mbarrier_init(uint32_t barrier, int arrivals);
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t barrier);
void mbarrier_arrive_expect(uint32_t barrier, int bytes);
void mbarrier_wait(uint32_t barrier, uint32_t parity, std::source_location where);

// A matrix as the copy engine sees it: bytes in rows, boxes of them; those of 128 are swizzled.
struct alignas(64) TensorMap {
  unsigned char* data;
  int64_t rows, width, row_bytes;  // only `width` bytes of a row count
  int box_rows, box_bytes;

  int64_t bytes() const { return int64_t(box_rows) * box_bytes; }
};

// Lands at some moment, and then signals the barrier. `ranks`: the blocks of the cluster that get
// it, a set of bits; 0 for the own block.
void load_tile(uint32_t to, const TensorMap& map, int x, int y, uint32_t barrier, uint16_t ranks);

// Reads shared memory when the thread waits for its group.
void store_tile(const TensorMap& map, int x, int y, uint32_t from);
void store_tile_commit();
void store_tile_wait_read(unsigned pending);

// Called by the scheduler.
void begin_copies(unsigned threads);
void check_copies_of_returning_thread();

}  // namespace cuda_on_cpu
