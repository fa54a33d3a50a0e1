// Linear layer whose weight holds at most two non-zeros in every four consecutive columns.
//
// Packed weight, per row and per chunk of 32 columns (eight groups of four):
//   values   16 of them, two per group, in column order
//   indices  4 bytes, a nibble per group, low nibble first: the low two bits are the position in
//            the group of its first value, the high two of its second; ascending
// so the 2-bit positions of the 16 values lie in one little-endian uint32 in the values' order. A
// group with fewer than two non-zeros takes the lowest free positions with value 0.
//
// Float values: y[m][n] = narrow(sum over stored values v of v * x[m][column of v] + bias[n]), in
// fp32, x past its last column reading as zero. Only the stored columns are read: NaN or infinity
// in another column of x never reaches the output, and in a stored one always does, even where the
// stored value is a filling 0. The order of the sum depends on the kernel and on the number of rows
// of x, never on the tile: results do not depend on the number of threads. The kernel for pairs of
// bf16 takes subnormal operands, products and sums for 0.
//
// Int8 values: q as in common/linear.h, acc exact in int32, so the bits are those of int8_linear on
// the dense weight.
//
// Any nibble addresses memory inside its group; a pair of positions that is not ascending gives
// some number, and nothing worse.
//
// On a GPU float values are fp16 or bf16, as x then is: its sparse products would round fp32 to
// tf32.
#pragma once

#include <cstdint>

#include "common/float_rows.h"
#include "common/isa.h"
#include "common/linear.h"

namespace trine {

inline constexpr int64_t kSparse24Columns = 32;  // columns of one chunk
inline constexpr int64_t kSparse24Values = 16;   // values of one chunk
inline constexpr int64_t kSparse24Indices = 4;   // bytes of indices of one chunk
// 127 * 127 * k must stay below 2^31, as if all columns were stored: the bound of int8_linear.
inline constexpr int64_t kSparse24Int8MaxK = 131072;

// How far ahead of a kernel's reading its weight is prefetched, in bytes of values. A kernel takes
// several rows at once, and the processor foresees one stream of lines better than theirs: lines
// are asked for in the order of memory, into L2. Measured on Zen 4, one row of x, fp32 and
// bf16: 1.5 and 2.2 times as fast as with lines 1 KiB ahead in each row; 8 KiB and 32 KiB are
// worse.
inline constexpr int64_t kAheadBytes = 16 << 10;

// Activations widened to fp32, in blocks of `block` rows, each column by column:
//   x[m][column] = data[(m / block) * block * columns + column * block + m % block]
// `columns` is k rounded up to whole chunks; what lies past m and past k is zero. (For pairs of
// bf16: as avx512bf16.cpp describes.)
struct FloatBlocks {
  const float* data;
  int64_t m, columns, block;
};

struct Sparse24FloatWeight {
  const void* values;
  FloatType type;
  const uint8_t* indices;
};

// How many rows of x the kernel wants in a block when there are m of them in all.
using Sparse24BlockFn = int64_t(int64_t m);
// Writes block `b` of FloatBlocks.
using Sparse24WidenFn = void(const FloatRows& x, int64_t b, int64_t block, int64_t columns,
                             float* data);
using Sparse24FloatFn = void(const FloatBlocks& x, const Sparse24FloatWeight& weight,
                             const LinearOutput& out, const Tile& tile);

// From this many rows on, bf16 values and bf16 x are multiplied in pairs where the processor can.
inline constexpr int64_t kSparse24PairedRows = 8;

struct Sparse24FloatKernel {
  Isa needs;
  int64_t column_bytes;  // of a column of one row in FloatBlocks
  Sparse24BlockFn* block;
  Sparse24WidenFn* widen;
  Sparse24FloatFn* run;
};

struct Sparse24Int8Weight {
  const int8_t* values;
  const uint8_t* indices;
  int64_t chunks;      // in a row
  const float* scale;  // [n]
};

using Sparse24Int8Fn = void(const QuantizedRows& x, const Sparse24Int8Weight& weight,
                            const LinearOutput& out, const Tile& tile);

struct Sparse24Int8Kernel {
  Isa needs;
  Sparse24Int8Fn* run;
};

Sparse24BlockFn sparse24_block_scalar, sparse24_block_avx2, sparse24_block_avx512,
    sparse24_block_avx512bf16, sparse24_block_neon;
Sparse24WidenFn sparse24_widen_scalar, sparse24_widen_avx2, sparse24_widen_avx512,
    sparse24_widen_avx512bf16, sparse24_widen_neon;
Sparse24FloatFn sparse24_float_scalar, sparse24_float_avx2, sparse24_float_avx512,
    sparse24_float_avx512bf16, sparse24_float_neon;
Sparse24Int8Fn sparse24_int8_scalar, sparse24_int8_avx2, sparse24_int8_avx2vnni,
    sparse24_int8_avx2vnni_evex, sparse24_int8_avx512vnni, sparse24_int8_avx512vbmi,
    sparse24_int8_dotprod, sparse24_int8_i8mm;

}  // namespace trine
