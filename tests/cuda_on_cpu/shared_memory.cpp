#include "shared_memory.h"

#include <cstring>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "driver.h"
#include "emulator.h"

namespace cuda_on_cpu {
namespace {

constexpr unsigned char kPoison = 0xa5;
constexpr uint32_t kFirstAddress = 1024;    // the system's own comes before
constexpr uint32_t kMostBytes = 227 << 10;  // that a block can get, on sm_90
constexpr int kRankShift = 24;
constexpr std::size_t kDynamicAlignment = 1024;

struct SharedArray {
  std::unique_ptr<GuardedBuffer> memory;  // guarded in the same way
  std::vector<unsigned char> async_view;
  uint32_t address;
  std::size_t bytes;
};

struct BlockMemory {
  std::vector<SharedArray*> arrays;  // in use, by address
  uint32_t next = kFirstAddress;
};

// Mapping memory costs more than filling it, so that arrays serve one block after the other.
std::map<std::pair<unsigned, const void*>, SharedArray> all_arrays;
std::vector<BlockMemory> memories;
const char dynamic_key = 0;

void* array_of(unsigned block, const void* key, std::size_t bytes, std::size_t alignment) {
  SharedArray& array = all_arrays[{block, key}];
  BlockMemory& memory = memories[block];
  for (SharedArray* known : memory.arrays)
    if (known == &array) return array.memory->data<unsigned char>();
  if (array.memory == nullptr || array.bytes != bytes)
    array.memory = std::make_unique<GuardedBuffer>("a shared array", bytes, alignment);
  array.bytes = bytes;
  array.address = uint32_t((memory.next + alignment - 1) / alignment * alignment);
  memory.next = uint32_t(array.address + bytes);
  if (memory.next - kFirstAddress > kMostBytes)
    fail("the block's shared arrays take %u bytes, more than any GPU has",
         memory.next - kFirstAddress);
  std::memset(array.memory->data<unsigned char>(), kPoison, bytes);
  array.async_view.assign(bytes, kPoison);
  memory.arrays.push_back(&array);
  return array.memory->data<unsigned char>();
}

}  // namespace

void* shared_array(const void* key, std::size_t bytes, std::size_t alignment) {
  return array_of(running_block(), key, bytes, alignment);
}

unsigned char* dynamic_shared() {
  for (SharedArray* array : memories[running_block()].arrays)
    if (array == &all_arrays[{running_block(), &dynamic_key}])
      return array->memory->data<unsigned char>();
  fail("the kernel uses dynamic shared memory, but its launch asked for none");
}

uint32_t shared_address(const void* pointer) {
  const auto* byte = static_cast<const unsigned char*>(pointer);
  for (const SharedArray* array : memories[running_block()].arrays) {
    const auto* begin = array->memory->data<unsigned char>();
    if (byte >= begin && byte <= begin + array->bytes)
      return array->address + uint32_t(byte - begin);
  }
  fail("%p is not in shared memory of the block", pointer);
}

uint32_t address_in_block(uint32_t address, unsigned rank) {
  return (address & ((1u << kRankShift) - 1)) | (rank + 1) << kRankShift;
}

unsigned char* at_shared(View view, unsigned block, uint32_t address, std::size_t bytes,
                         std::size_t alignment, const char* operation) {
  const uint32_t named = address >> kRankShift, offset = address & ((1u << kRankShift) - 1);
  if (named != 0) block = named - 1;
  if (block >= memories.size())
    fail("%s names block %u of a cluster of %zu", operation, block, memories.size());
  if (offset % alignment != 0)
    fail("%s at shared address %#x is not aligned to %zu", operation, offset, alignment);
  for (SharedArray* array : memories[block].arrays)
    if (offset >= array->address && offset + bytes <= array->address + array->bytes)
      return (view == View::threads ? array->memory->data<unsigned char>()
                                    : array->async_view.data()) +
             (offset - array->address);
  fail("%s of %zu bytes at shared address %#x is outside of every shared array of block %u",
       operation, bytes, offset, block);
}

void poison(unsigned block, uint32_t address, std::size_t bytes) {
  for (View view : {View::threads, View::async_units})
    std::memset(at_shared(view, block, address, bytes, 1, "a copy"), kPoison, bytes);
}

void fence_async_proxy() {
  for (SharedArray* array : memories[running_block()].arrays)
    std::memcpy(array->async_view.data(), array->memory->data<unsigned char>(), array->bytes);
}

void begin_shared_memory(unsigned blocks, std::size_t dynamic_bytes) {
  memories.assign(blocks, {});
  if (dynamic_bytes > 0)
    for (unsigned block = 0; block < blocks; ++block)
      array_of(block, &dynamic_key, dynamic_bytes, kDynamicAlignment);
}

void check_shared_memory() {
  for (const BlockMemory& memory : memories)
    for (const SharedArray* array : memory.arrays) array->memory->check_not_overrun();
}

}  // namespace cuda_on_cpu
