// Float values on NEON, see float_values.h.
//
// What bounds it: with few rows, the instructions that decode and multiply four values: three for
// the places of their columns, and for each row of x two loads, a table look-up and a multiply-add;
// a Neoverse N1 or V1 then takes about as long as their 18 bytes (fp32) come from memory. With
// many, the loads: 17 registers for 16 multiply-adds, of which each stands for two of the dense
// product. Counted, not timed.
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
  static Vector zero() { return all_lanes(0.0f); }
  static Vector load(const float* p) { return load_floats(p); }
  static void store(float* p, Vector v) { store_floats(v, p); }
  static Vector broadcast(float value) { return all_lanes(value); }
  static Vector add(Vector a, Vector b) {
    return both<Floats>([](float32x4_t x, float32x4_t y) { return vaddq_f32(x, y); }, a, b);
  }
  static Vector multiply_add(Vector a, Vector b, Vector c) {
    return both<Floats>(
        [](float32x4_t x, float32x4_t y, float32x4_t z) { return vfmaq_f32(z, x, y); }, a, b, c);
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
    // Byte b of position p is byte 4 p + b of a group; the second group is 16 bytes further.
    const uint32x4_t bytes_of_groups = {0x03020100, 0x03020100, 0x13121110, 0x13121110};
    uint32_t bits;
    std::memcpy(&bits, indices, sizeof bits);
    Chunk chunk{{load_floats(values), load_floats(values + 8)}, {}};
    for (int i = 0; i < 4; ++i) {
      const int32x4_t shift = {-8 * i, -8 * i - 2, -8 * i - 4, -8 * i - 6};
      const uint32x4_t positions = vandq_u32(vshlq_u32(vdupq_n_u32(bits), shift), vdupq_n_u32(3));
      chunk.bytes[i] =
          vreinterpretq_u8_u32(vmlaq_u32(bytes_of_groups, positions, vdupq_n_u32(0x04040404)));
    }
    return chunk;
  }
  static void multiply_add(Sum& sum, const Chunk& chunk, const float* x) {
    const auto picked = [&](int i) {
      const auto* groups = reinterpret_cast<const uint8_t*>(x + 8 * i);
      return vreinterpretq_f32_u8(
          vqtbl2q_u8({{vld1q_u8(groups), vld1q_u8(groups + 16)}}, chunk.bytes[i]));
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
