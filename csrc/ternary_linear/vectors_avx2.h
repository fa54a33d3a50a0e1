// What the ternary kernels of 256-bit registers share: eight weight rows, or words, in the lanes.
#pragma once

#include <cstring>

#include "common/x86/gemm_finish_avx2.h"

namespace trine {
namespace {

struct Vectors256 {
  static constexpr int64_t kLanes = 8;
  // Four rows of two vectors of sums leave registers for codes, activations and their products.
  static constexpr int kTileRows = 4;
  static constexpr int kStreamRows = 2;
  // From three rows on, more of them for each word that is decoded are worth its transposition.
  static constexpr int64_t kFewRows = 2;
  static constexpr int kPlaneSums = 2;  // of four streams: there are 16 registers
  using Words = uint32_t __attribute__((vector_size(32)));
  using Int32 = int32_t __attribute__((vector_size(32)));
  using Floats = float __attribute__((vector_size(32)));

  static Words load(const void* from) {
    return (Words)_mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
  static Words load_first(const void* from, int64_t count) {
    return (Words)_mm256_maskload_epi32(static_cast<const int*>(from), first_lanes(count));
  }
  // Packed codes, as streams.h takes them.
  static constexpr int64_t kPackedBytes = 32;
  static Words load_codes(const uint8_t* from) { return load(from); }
  static Words load_first_codes(const uint8_t* from, int64_t bytes) {
    return load_first(from, bytes / 4);
  }
  static void store(Words words, void* to) {
    _mm256_store_si256(static_cast<__m256i*>(to), (__m256i)words);
  }
  static Words broadcast(const int8_t* q) {
    int32_t four;
    std::memcpy(&four, q, 4);
    return (Words)_mm256_set1_epi32(four);
  }
  static void sum_lanes(const Int32 (&sums)[4], int32_t* to) {
    _mm_store_si128(
        reinterpret_cast<__m128i*>(to),
        trine::sum_lanes((__m256i)sums[0], (__m256i)sums[1], (__m256i)sums[2], (__m256i)sums[3]));
  }

  static void store_chunks(const Int32 (&sums)[4], int32_t* to) {
    store((Words)sum_within_halves((__m256i)sums[0], (__m256i)sums[1], (__m256i)sums[2],
                                   (__m256i)sums[3]),
          to);
  }

  // Quarters of kLanes / 4 words each, which are halves here: 2 x 2.
  static void transpose_quarters(Words (&v)[2]) {
    const Words first = v[0];
    v[0] = (Words)_mm256_permute2x128_si256((__m256i)first, (__m256i)v[1], 0x20);
    v[1] = (Words)_mm256_permute2x128_si256((__m256i)first, (__m256i)v[1], 0x31);
  }

  // 8 x 8 dwords.
  static void transpose(Words (&lines)[8]) {
    __m256i pairs[8], fours[8];
    unrolled<4>([&](auto i) __attribute__((always_inline)) {
      pairs[2 * i] = _mm256_unpacklo_epi32((__m256i)lines[2 * i], (__m256i)lines[2 * i + 1]);
      pairs[2 * i + 1] = _mm256_unpackhi_epi32((__m256i)lines[2 * i], (__m256i)lines[2 * i + 1]);
    });
    // fours[4i + j]: half c holds word 4c + j of lines 4i to 4i + 3.
    unrolled<2>([&](auto i) __attribute__((always_inline)) {
      fours[4 * i] = _mm256_unpacklo_epi64(pairs[4 * i], pairs[4 * i + 2]);
      fours[4 * i + 1] = _mm256_unpackhi_epi64(pairs[4 * i], pairs[4 * i + 2]);
      fours[4 * i + 2] = _mm256_unpacklo_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
      fours[4 * i + 3] = _mm256_unpackhi_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
    });
    unrolled<4>([&](auto j) __attribute__((always_inline)) {
      lines[j] = (Words)_mm256_permute2x128_si256(fours[j], fours[4 + j], 0x20);
      lines[4 + j] = (Words)_mm256_permute2x128_si256(fours[j], fours[4 + j], 0x31);
    });
  }
};

}  // namespace
}  // namespace trine
