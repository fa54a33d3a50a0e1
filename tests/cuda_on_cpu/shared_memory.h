// The shared memory of the running cluster's blocks.
//
// Threads and the asynchronous units (copy engine, wgmma) see it through different proxies: what
// threads store reaches the units' view at fence.proxy.async only.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_on_cpu {

// An array of the running block: the same one for every thread that names the same `key`. It is
// poisoned, and ends at an unmapped page.
void* shared_array(const void* key, std::size_t bytes, std::size_t alignment);

// The bytes that the launch asked for, aligned to 1024.
unsigned char* dynamic_shared();

// What instructions that name shared memory take. Bits 24 on name another block of the cluster by
// its rank + 1; 0 there means the own one.
uint32_t shared_address(const void* pointer);
uint32_t address_in_block(uint32_t address, unsigned rank);

enum class View { threads, async_units };

// Memory of `block` (where the address names none) of which `bytes` at `address` must be one
// array's, aligned to `alignment`.
unsigned char* at_shared(View view, unsigned block, uint32_t address, std::size_t bytes,
                         std::size_t alignment, const char* operation);

// What is being overwritten has no value.
void poison(unsigned block, uint32_t address, std::size_t bytes);

// Shows the running block's stores to the asynchronous units. A fence shows those of its own
// thread; this shows all, so a fence that only some threads lack goes unnoticed.
void fence_async_proxy();

// Called by the scheduler around each cluster.
void begin_shared_memory(unsigned blocks, std::size_t dynamic_bytes);
void check_shared_memory();

}  // namespace cuda_on_cpu
