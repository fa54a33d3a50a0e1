// The ternary kernels' vectors with AVX-512 VNNI: sixteen weight rows, or words, in the lanes.
#pragma once

#include "common/x86/gemm_avx512vnni.h"

namespace trine {
namespace {

struct Vectors512 {
  static constexpr int64_t kLanes = 16;
  // Sixteen sums: measured as fast as 20, which also fit beside words, codes and activations.
  static constexpr int kTileRows = 8;
  static constexpr int kStreamRows = 4;
  static constexpr int64_t kFewRows = 12;
  // No scaled sum overflows: kTernaryMaxK / 64 products of up to 3 << 6 are below 2^31.
  static constexpr int kPlaneSums = 4;
  static constexpr int64_t kDotsPerSum = 0;
  using Words = uint32_t __attribute__((vector_size(64)));
  using Int32 = Int32x16;
  using Sums = Int32;
  using Floats = float __attribute__((vector_size(64)));

  static Words load(const void* from) {
    auto words = (Words)_mm512_loadu_si512(from);
    asm("" : "+v"(words));  // gcc would load it again at each use
    return words;
  }
  static Words load_first(const void* from, int64_t count) {
    return (Words)_mm512_maskz_loadu_epi32(first_lanes(count), from);
  }
  // Packed codes, as streams.h takes them.
  static constexpr int64_t kPackedBytes = 64;
  static Words load_codes(const uint8_t* from) { return load(from); }
  static Words load_first_codes(const uint8_t* from, int64_t bytes) {
    return load_first(from, bytes / 4);
  }
  static void store(Words words, void* to) { _mm512_store_si512(to, (__m512i)words); }
  static Words broadcast(const int8_t* q) {
    int32_t four;
    std::memcpy(&four, q, 4);
    auto words = (Words)_mm512_set1_epi32(four);
    asm("" : "+v"(words));
    return words;
  }
  static Sums dot(Sums sum, Words codes, Words q) {
    return (Sums)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)q);
  }
  static Int32 widened(Sums sum) { return sum; }
  static void sum_lanes(const Int32 (&sums)[4], int32_t* to) {
    const __m512i quarters =
        sum_within_quarters((__m512i)sums[0], (__m512i)sums[1], (__m512i)sums[2], (__m512i)sums[3]);
    _mm_store_si128(reinterpret_cast<__m128i*>(to), sum_quarters(quarters));
  }

  static void store_chunks(const Int32 (&sums)[4], int32_t* to) {
    store((Words)sum_within_quarters((__m512i)sums[0], (__m512i)sums[1], (__m512i)sums[2],
                                     (__m512i)sums[3]),
          to);
  }

  // 4 x 4 quarters.
  static void transpose_quarters(Words (&v)[4]) {
    const __m512i a = _mm512_shuffle_i32x4((__m512i)v[0], (__m512i)v[1], 0x44);
    const __m512i b = _mm512_shuffle_i32x4((__m512i)v[2], (__m512i)v[3], 0x44);
    const __m512i c = _mm512_shuffle_i32x4((__m512i)v[0], (__m512i)v[1], 0xee);
    const __m512i d = _mm512_shuffle_i32x4((__m512i)v[2], (__m512i)v[3], 0xee);
    v[0] = (Words)_mm512_shuffle_i32x4(a, b, 0x88);
    v[1] = (Words)_mm512_shuffle_i32x4(a, b, 0xdd);
    v[2] = (Words)_mm512_shuffle_i32x4(c, d, 0x88);
    v[3] = (Words)_mm512_shuffle_i32x4(c, d, 0xdd);
  }

  // 16 x 16 dwords.
  static void transpose(Words (&lines)[16]) {
    __m512i pairs[16], fours[16];
    unrolled<8>([&](auto i) __attribute__((always_inline)) {
      pairs[2 * i] = _mm512_unpacklo_epi32((__m512i)lines[2 * i], (__m512i)lines[2 * i + 1]);
      pairs[2 * i + 1] = _mm512_unpackhi_epi32((__m512i)lines[2 * i], (__m512i)lines[2 * i + 1]);
    });
    // fours[4i + j]: quarter c holds word 4c + j of lines 4i to 4i + 3.
    unrolled<4>([&](auto i) __attribute__((always_inline)) {
      fours[4 * i] = _mm512_unpacklo_epi64(pairs[4 * i], pairs[4 * i + 2]);
      fours[4 * i + 1] = _mm512_unpackhi_epi64(pairs[4 * i], pairs[4 * i + 2]);
      fours[4 * i + 2] = _mm512_unpacklo_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
      fours[4 * i + 3] = _mm512_unpackhi_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
    });
    unrolled<4>([&](auto j) __attribute__((always_inline)) {
      const __m512i even0 = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x88);
      const __m512i even1 = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x88);
      const __m512i odd0 = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xdd);
      const __m512i odd1 = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xdd);
      lines[j] = (Words)_mm512_shuffle_i32x4(even0, even1, 0x88);
      lines[8 + j] = (Words)_mm512_shuffle_i32x4(even0, even1, 0xdd);
      lines[4 + j] = (Words)_mm512_shuffle_i32x4(odd0, odd1, 0x88);
      lines[12 + j] = (Words)_mm512_shuffle_i32x4(odd0, odd1, 0xdd);
    });
  }
};

}  // namespace
}  // namespace trine
