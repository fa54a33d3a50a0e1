// Float values on NEON, see float_values.h.
//
// What bounds it, counted and not timed: with few rows, per four values the three instructions that
// decode the places of their columns, and for each row of x a load of two registers, a table
// look-up and a multiply-add; with one row a Neoverse N1 runs those on its vector pipes in 2.5
// cycles, 18 bytes of fp32 weight. With many, the loads: a register for each multiply-add, which
// stands for two of the dense product and takes 1.9 instructions in all.
#include "common/arm/float_neon.h"
#include "common/arm/transpose.h"
#include "sparse24_linear/float_values.h"

namespace trine {
namespace {

struct Simd {
  static constexpr int64_t kLanes = 8;
  // Five rows padded to eight take fewer instructions than five tables of columns each.
  static constexpr int64_t kManyRows = 5;
  static constexpr int kMaxVectors = 8;                  // 16 of the 32 registers hold sums
  static constexpr int kTileRows = 2, kTileColumns = 2;  // 8 registers of sums, 16 of weight

  using Vector = Floats;
  [[gnu::always_inline]] static Vector zero() { return all_lanes(0.0f); }
  [[gnu::always_inline]] static Vector load(const float* p) { return load_floats(p); }
  static void store(float* p, Vector v) { store_floats(v, p); }
  // Otherwise gcc adds up the address of each vector of a column: an instruction per multiply-add.
  static void settle(const float*& column) { asm volatile("" : "+r"(column)); }
  [[gnu::always_inline]] static Vector broadcast(float value) { return all_lanes(value); }
  [[gnu::always_inline]] static Vector add(Vector a, Vector b) {
    return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)};
  }
  [[gnu::always_inline]] static Vector multiply_add(Vector a, Vector b, Vector c) {
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
  }

  // Two groups, eight columns of x in two registers, hold the columns of four values: a table of
  // 32 bytes from which tbl picks four times four.
  struct Chunk {
    Floats values[2];
    uint8x16_t bytes[4];
  };
  using Sum = Floats;

  template <class T>
  static Chunk load_chunk(const T* values, const uint8_t* indices) {
    // A byte of indices is the positions of four values, two bits each. Byte b of position p is
    // byte 4 p + b of a group; the second group is 16 bytes further. (By way of a word, so that gcc
    // spreads a byte from an integer register: as a load it would take a vector pipe too.)
    const int8x16_t shift = {2, 2, 2, 2, 0, 0, 0, 0, -2, -2, -2, -2, -4, -4, -4, -4};
    const uint8x16_t bytes = {0, 1, 2, 3, 0, 1, 2, 3, 16, 17, 18, 19, 16, 17, 18, 19};
    uint32_t word;
    std::memcpy(&word, indices, sizeof word);
    Chunk chunk{{load_floats(values), load_floats(values + 8)}, {}};
    for (int i = 0; i < 4; ++i) {
      const uint8x16_t places = vshlq_u8(vdupq_n_u8(static_cast<uint8_t>(word >> 8 * i)), shift);
      chunk.bytes[i] = vorrq_u8(vandq_u8(places, vdupq_n_u8(0x0c)), bytes);
    }
    return chunk;
  }
  static void multiply_add(Sum& sum, const Chunk& chunk, const float* x) {
    const auto picked = [&](int i) {
      const uint8x16x2_t groups = vld1q_u8_x2(reinterpret_cast<const uint8_t*>(x + 8 * i));
      return vreinterpretq_f32_u8(vqtbl2q_u8(groups, chunk.bytes[i]));
    };
    for (int i = 0; i < 2; ++i)
      sum = multiply_add(chunk.values[i], Floats{picked(2 * i), picked(2 * i + 1)}, sum);
  }
  static float total(const Sum& sum) { return vaddvq_f32(vaddq_f32(sum.low, sum.high)); }
};

}  // namespace

int64_t sparse24_block_neon(int64_t m) { return rows_per_block<Simd>(m); }

void sparse24_widen_neon(const FloatRows& x, int64_t b, int64_t block, int64_t columns,
                         float* data) {
  widen_block<Simd>(x, b, block, columns, data);
}

void sparse24_float_neon(const FloatBlocks& x, const Sparse24FloatWeight& weight,
                         const LinearOutput& out, const Tile& tile) {
  sparse24_float_tile<Simd>(x, weight, out, tile);
}

}  // namespace trine
