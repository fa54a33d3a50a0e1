// bf16 values and many rows of bf16 x, on AVX512-BF16. Lanes are rows of x, see float_values.h; but
// vdpbf16ps multiplies two columns at once: the two values of a group, broadcast, by the two
// columns that belong to them. There are six pairs of columns in a group, so x is laid out as all
// six:
//
//   x[group of columns][pair][row] = two bf16
//
// 1.5 times the bytes of x in fp32, of which each group of a weight row reads a sixth.
//
// vdpbf16ps takes subnormal operands, products and sums for 0; else its sums err no more than those
// of fp32.
//
// What bounds it: the reading of x from L1, a vector for each vdpbf16ps, and of a pair of values:
// five cycles for four columns of 64 rows, where the dense product takes eight. Measured on Zen 4
// at K = 2560: 250 GFLOP/s of the dense product with 64 rows or more, 66% of that. With 8 rows half
// of the lanes are idle: there it is as fast as the dense product from memory, with 16 1.3 times.
#include "common/x86/float_avx512.h"
#include "common/x86/transpose.h"
#include "sparse24_linear/float_values.h"

namespace trine {
namespace {

inline constexpr int64_t kGroupsOfChunk = kSparse24Columns / 4;
inline constexpr int64_t kPairs = 6;

// Which of the six a nibble means; damaged ones mean some.
constexpr uint8_t pair_of(int nibble) {
  constexpr uint8_t kPairOf[4][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}, {1, 3, 0, 0}, {2, 4, 5, 0}};
  return kPairOf[nibble >> 2][nibble & 3];
}
struct PairsOfByte {
  uint8_t low[256], high[256];
};
constexpr PairsOfByte kPairsOfByte = [] {
  PairsOfByte pairs{};
  for (int byte = 0; byte < 256; ++byte) {
    pairs.low[byte] = pair_of(byte & 15);
    pairs.high[byte] = pair_of(byte >> 4);
  }
  return pairs;
}();

struct Simd {
  static constexpr int64_t kLanes = 16;
  static constexpr int64_t kManyRows = 1;  // fewer go elsewhere: kSparse24PairedRows
  static constexpr int kMaxVectors = 4;
  static constexpr int64_t kChunkVectors = kGroupsOfChunk * kPairs;
  // As measured: longer ones are slower, though they would fit.
  template <int kVectors>
  static constexpr int64_t kSliceChunks = kVectors == 1 ? 4 : 2;

  using Vector = __m512;
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }

  // As add_slice of float_values.h.
  template <int kVectors>
  static void add_slice(const float* x, const bfloat16* values, const uint8_t* indices,
                        int64_t chunks, const bfloat16* upcoming, float* sums) {
    constexpr int64_t kBlock = kVectors * kLanes;
    constexpr int kTurns = std::max(1, 8 / kVectors);
    __m512 acc[kTurns][kVectors];
    for (auto& turn : acc)
      for (auto& sum : turn) sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < chunks; ++c) {
      __builtin_prefetch(upcoming + c * kSparse24Values);
      unrolled<kGroupsOfChunk>([&](auto group) __attribute__((always_inline)) {
        const auto& pairs = group % 2 == 0 ? kPairsOfByte.low : kPairsOfByte.high;
        const float* columns = x + (group * kPairs + pairs[indices[group / 2]]) * kBlock;
        int32_t bits;
        std::memcpy(&bits, values + 2 * group, sizeof bits);
        const auto two = (__m512bh)_mm512_set1_epi32(bits);
        unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
          acc[group % kTurns][v] = _mm512_dpbf16_ps(
              acc[group % kTurns][v], (__m512bh)_mm512_loadu_ps(columns + v * kLanes), two);
        });
      });
      x += kChunkVectors * kBlock;
      values += kSparse24Values;
      indices += kSparse24Indices;
    }
    for (int v = 0; v < kVectors; ++v) {
      auto sum = acc[0][v];
      for (int turn = 1; turn < kTurns; ++turn) sum = _mm512_add_ps(sum, acc[turn][v]);
      float* to = sums + v * kLanes;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum));
    }
  }
};

// Sixteen rows of a group: columns 0 and 1 in `low`, 2 and 3 in `high`.
void write_pairs(__m512i low, __m512i high, int64_t block, float* to) {
  const __m512i second = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  constexpr int kSelect = 0xca;  // a ? b : c
  const auto join = [&](__m512i first_at_bit_0, __m512i second_at_bit_16) {
    return _mm512_ternarylogic_epi32(second, second_at_bit_16, first_at_bit_0, kSelect);
  };
  const __m512i column1 = _mm512_srli_epi32(low, 16), column2 = _mm512_slli_epi32(high, 16);
  const __m512i pairs[kPairs] = {
      low, join(low, column2), join(low, high), join(column1, column2), join(column1, high), high};
  for (const __m512i& pair : pairs) {
    _mm512_storeu_si512(to, pair);
    to += block;
  }
}

}  // namespace

int64_t sparse24_block_avx512bf16(int64_t m) { return rows_per_block<Simd>(m); }

void sparse24_widen_avx512bf16(const FloatRows& x, int64_t b, int64_t block, int64_t columns,
                               float* data) {
  for (int64_t i = 0; i < block; i += Simd::kLanes)
    for (int64_t column = 0; column < columns; column += 4) {
      uint32_t low[Simd::kLanes] = {}, high[Simd::kLanes] = {};
      const int64_t first = b * block + i, count = std::min(x.m - first, Simd::kLanes);
      for (int64_t m = 0; m < count; ++m) {
        const char* row = x.data + (first + m) * x.row_bytes + 2 * column;
        const int64_t left = std::clamp<int64_t>(x.k - column, 0, 4);
        uint64_t four = 0;
        if (left == 4)
          std::memcpy(&four, row, 8);
        else
          std::memcpy(&four, row, static_cast<std::size_t>(2 * left));
        low[m] = static_cast<uint32_t>(four);
        high[m] = static_cast<uint32_t>(four >> 32);
      }
      write_pairs(_mm512_loadu_si512(low), _mm512_loadu_si512(high), block,
                  data + (column / 4 * kPairs) * block + i);
    }
}

void sparse24_float_avx512bf16(const FloatBlocks& x, const Sparse24FloatWeight& weight,
                               const LinearOutput& out, const Tile& tile) {
  const WeightRows rows{static_cast<const bfloat16*>(weight.values), weight.indices,
                        x.columns / kSparse24Columns};
  const int64_t row_floats = rows.chunks * Simd::kChunkVectors;
  for (int64_t m = tile.m_begin / x.block * x.block; m < tile.m_end; m += x.block)
    large_vectors<Simd, Simd::kMaxVectors>(x.block / Simd::kLanes, x.data + m * row_floats, m, rows,
                                           out, tile);
}

}  // namespace trine
