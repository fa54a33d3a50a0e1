// ternary24_linear for every GPU from sm_80 on.
//
// Few rows (to 64): the weight is read once, 1.5 bits of each, by the kernel of ternary_linear and
// int8_linear. A group is six bits and becomes a word of four bytes, a lane's word of A: by a
// look-up in shared memory, where each lane has a table in a bank of its own.
//
// What bounds that, as calculated: memory brings an SM of an H200 18 bytes a clock, 24 groups. A
// group takes a shift and an AND, of 64 that an SM starts in a clock, and one of 32 look-ups: each
// three quarters of what memory's time allows. Arithmetic in place of the table takes 6
// instructions a group: PRMT finds one of eight bytes, the 33 states of a group take two of them
// and what joins them. Each lane has 6 loads of 16 bytes on their way, two weight tiles 12: 24 KB
// in a block, of which two fit an SM.
//
// More rows: the weight is unpacked once to what the sparse tensor cores take (mma.sp, on sm_90a
// wgmma.sp), values in bytes and indices, 5 bits a weight, and multiplied by sparse24_linear's
// kernels: the same sums, the same bits. That moves 11.5 bits of a weight, the product twice as
// many operations a clock as on dense operands: from some 200 rows on it takes less time than
// two-bit codes would on dense ones.
#include "ternary24_linear/cuda.h"

#include "common/cuda/few_rows.cuh"

namespace trine {
namespace {

constexpr int kGroupBits = 6, kGroups = 1 << kGroupBits;  // states of a group's bits

// Both values of a group, the columns ascending. A missing one is a 0 in a column beside the other.
struct Group {
  uint32_t first, second;                // bytes: 0, 1 or 0xff
  uint32_t first_column, second_column;  // 0 to 2, 1 to 3
};

__device__ __forceinline__ uint32_t value_of(bool is_minus) { return is_minus ? 0xffu : 1u; }

__device__ __forceinline__ Group group_of_bits(uint32_t bits) {
  const uint32_t first_column = bits & 3, second_column = bits >> 3 & 3;
  const bool first_is_minus = (bits & 4) != 0, second_is_minus = (bits & 32) != 0;
  const bool has_first = first_column != 3, has_second = second_column != 0;
  const uint32_t first = value_of(first_is_minus), second = value_of(second_is_minus);
  if (has_first && has_second && first_column < second_column)
    return {first, second, first_column, second_column};
  if (has_first && has_second && first_column > second_column)
    return {second, first, second_column, first_column};
  if (!has_first && !has_second) return {0, 0, 0, 3};
  // One value; where both are in one column it is -1 only if both are.
  const uint32_t column = has_first ? first_column : second_column;
  const uint32_t one = !has_second  ? first
                       : !has_first ? second
                                    : value_of(first_is_minus && second_is_minus);
  if (column == 3) return {0, one, 0, 3};
  return {one, 0, column, 3};
}

// A lane reads 48 bytes of a row at a time: 64 groups.
class Ternary24Chunk {
 public:
  static constexpr int kPieces = 3, kMostBatchTiles = 4;
  // Of whole words.
  static constexpr int parts(int weight_tiles, int batch_tiles) {
    return batch_tiles == 4 ? 4 : weight_tiles;
  }
  static constexpr int kUnits = 16, kMostSets = 1;
  static constexpr int most_weight_tiles(int batch_tiles) { return batch_tiles == 1 ? 2 : 1; }
  static constexpr int32_t kOffset = 0;
  static constexpr bool kActivates = false;
  static constexpr int least_blocks(int batch_tiles) { return batch_tiles <= 2 ? 2 : 1; }

  // The tables, for all threads of the block.
  __device__ __forceinline__ Ternary24Chunk() {
    TRINE_SHARED_ARRAY(uint32_t, tables, kGroups* kWarpThreads);
    for (int i = int(threadIdx.x); i < kGroups * kWarpThreads; i += int(blockDim.x)) {
      const Group group = group_of_bits(uint32_t(i / kWarpThreads));
      tables[i] = group.first << 8 * group.first_column | group.second << 8 * group.second_column;
    }
    __syncthreads();
    tables_ = reinterpret_cast<const unsigned char*>(tables);
    own_ = threadIdx.x % kWarpThreads * kEntryBytes;
  }

  template <int kSets>
  __device__ __forceinline__ uint32_t fragment(const uint4 (&pieces)[kPieces], int unit,
                                               int f) const {
    const int bit = kGroupBits * (4 * unit + f), word = bit / 32, shift = bit % 32;
    const auto word_at = [&](int i) { return word_of(pieces[i / 4], i % 4); };
    // To where the bits count the rows of the tables.
    uint32_t bits;
    if (shift > 32 - kGroupBits)
      bits = __funnelshift_r(word_at(word), word_at(word + 1), shift) << kRowBits;
    else
      bits = shift > kRowBits ? word_at(word) >> (shift - kRowBits)
                              : word_at(word) << (kRowBits - shift);
    return *reinterpret_cast<const uint32_t*>(tables_ + ((bits & kRowMask) | own_));
  }

  // The words of a part go, the others move to the front.
  template <int kParts>
  static __device__ __forceinline__ void next_part(uint4 (&pieces)[kPieces]) {
    constexpr int kWords = 4 * kPieces, kGone = kWords / kParts;
    const auto moved = [&](int i) {
      return i + kGone < kWords ? word_of(pieces[(i + kGone) / 4 % kPieces], (i + kGone) % 4) : 0u;
    };
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      pieces[i] = {moved(4 * i), moved(4 * i + 1), moved(4 * i + 2), moved(4 * i + 3)};
  }

 private:
  static constexpr int kEntryBytes = 4, kRowBits = 7;  // a row: an entry of each of 32 lanes
  static_assert(1 << kRowBits == kEntryBytes * kWarpThreads);
  static constexpr uint32_t kRowMask = (kGroups - 1) << kRowBits;

  const unsigned char* tables_;
  uint32_t own_;
};

// Sixteen groups, 12 bytes of a row, are a thread's: two chunks of sparse24_linear.
constexpr int kUnpackThreads = 256;
constexpr int kUnitGroups = 16, kUnitWords = kUnitGroups * kGroupBits / 32, kUnitChunks = 2;
constexpr int kChunkColumns = 32, kChunkValues = 16, kChunkGroups = 8;

__global__ void __launch_bounds__(kUnpackThreads)
    unpack_kernel(const uint8_t* packed, int64_t packed_stride, int64_t n, int64_t chunks,
                  int8_t* values, uint32_t* indices) {
  // Of each state: both values, and the index above them.
  TRINE_SHARED_ARRAY(uint32_t, table, kGroups);
  if (threadIdx.x < kGroups) {
    const Group group = group_of_bits(threadIdx.x);
    table[threadIdx.x] =
        group.first | group.second << 8 | (group.first_column | group.second_column << 2) << 16;
  }
  __syncthreads();
  const int64_t units = (chunks + kUnitChunks - 1) / kUnitChunks;
  const int64_t i = int64_t(blockIdx.x) * kUnpackThreads + threadIdx.x;
  const int64_t row = i / units, unit = i % units;
  if (row >= n) return;
  uint32_t words[kUnitWords] = {};
#pragma unroll
  for (int w = 0; w < kUnitWords; ++w) {
    const int64_t at = (unit * kUnitWords + w) * 4;
    if (at < packed_stride) load_global<4>(&words[w], packed + row * packed_stride + at);
  }
#pragma unroll
  for (int chunk = 0; chunk < kUnitChunks; ++chunk) {
    uint32_t of_values[kChunkValues / 4] = {}, index = 0;
#pragma unroll
    for (int g = 0; g < kChunkGroups; ++g) {
      const int bit = kGroupBits * (chunk * kChunkGroups + g), word = bit / 32;
      const uint32_t next = word + 1 < kUnitWords ? words[word + 1] : 0;
      const uint32_t entry = table[__funnelshift_r(words[word], next, bit % 32) % kGroups];
      of_values[g / 2] |= (entry & 0xffffu) << g % 2 * 16;
      index |= entry >> 16 << 4 * g;
    }
    const int64_t to = row * chunks + unit * kUnitChunks + chunk;
    if (unit * kUnitChunks + chunk >= chunks) continue;
    store_global<16>(values + to * kChunkValues, of_values);
    indices[to] = index;
  }
}

}  // namespace

void ternary24_linear_few_cuda(const DeviceLinear& linear, cudaStream_t stream) {
  if (linear.m == 0 || linear.n == 0) return;
  few_rows_linear<Ternary24Chunk>("ternary24_linear", linear, stream);
}

void ternary24_unpack_cuda(const uint8_t* packed, int64_t packed_stride, int64_t n, int64_t k,
                           int8_t* values, uint32_t* indices, cudaStream_t stream) {
  const int64_t chunks = (k + kChunkColumns - 1) / kChunkColumns;
  const int64_t units = (chunks + kUnitChunks - 1) / kUnitChunks * n;
  if (units == 0) return;
  launch("ternary24_linear", unpack_kernel,
         {(units + kUnpackThreads - 1) / kUnpackThreads, kUnpackThreads}, stream, packed,
         packed_stride, n, chunks, values, indices);
}

}  // namespace trine
