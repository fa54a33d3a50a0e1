// AVX-512 VNNI and VBMI, where one look-up decodes 64 groups: 256 weights.
//
// With few rows of x the packed weight is decoded on its way to the streams of ternary_linear, see
// ternary_linear/streams.h; with more, only the values that are there are multiplied, see picks.h.
//
// What bounds it, measured on Zen 4 with 1 thread at three layers, and times as fast as
// ternary_linear, which reads a third more:
// - one row: the instructions. Three to decode 256 weights, four ANDs and four vpdpbusd could be
//   done in 5.5 cycles; 7.8 are measured from the caches, where ternary_linear's eight take 5.6:
//   0.71 to 0.75 times. Memory gives their 48 bytes in 7.7, so that from there it is 0.96 to 1.06
//   times, with 2 threads 1.05 to 1.11. The 1.33 that the bytes would allow need cores that get
//   less of memory.
// - two to four rows: the products, and the decoding beside them: 0.71 to 0.86 times from the
//   caches, 0.82 to 0.92 from memory.
// - five rows and more: the making of the picks, then the units that pick or multiply, see picks.h:
//   0.7 to 0.96 times at 5 and 8 rows, 1.0 to 1.14 at 16, 1.13 to 1.22 at 32, from 128 rows on 1.22
//   to 1.28. Fetching what the next panel is made of, or touching its pages, gained nothing.
#include "common/changed_rows.h"
#include "ternary24_linear/picks.h"
#include "ternary_linear/streams.h"
#include "ternary_linear/vectors_avx512vnni.h"

namespace trine {
namespace {

inline constexpr Table64 kCodes = make_table(ternary24_codes);

struct Simd : Vectors512 {
  static constexpr int64_t kPackedBytes = 48;

  static Words load_codes(const uint8_t* from) { return codes(_mm512_loadu_si512(from)); }
  static Words load_first_codes(const uint8_t* from, int64_t bytes) {
    return codes((__m512i)load_first(from, bytes / 4));
  }

 private:
  // Byte b is group b; column p of it is plane p.
  [[gnu::always_inline]] static Words codes(__m512i packed) {
    // Qword i gets bytes 6i .. 6i + 5.
    const __m512i bytes = _mm512_setr_epi64(
        0x0000050403020100, 0x00000b0a09080706, 0x000011100f0e0d0c, 0x0000171615141312,
        0x00001d1c1b1a1918, 0x0000232221201f1e, 0x0000292827262524, 0x00002f2e2d2c2b2a);
    const __m512i groups = spread_groups(_mm512_permutexvar_epi8(bytes, packed));
    return (Words)_mm512_permutexvar_epi8(groups, _mm512_load_si512(kCodes.entry));
  }
};

}  // namespace

void ternary24_linear_avx512vbmi(const QuantizedRows& x, const Ternary24Weight& weight,
                                 const LinearOutput& out, const Tile& tile) {
  if (tile.m_end - tile.m_begin <= Simd::kStreamRows) {
    // Column p of four groups follow on one another, as codes of ternary_linear do.
    const __m512i by_column =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    with_changed_rows(
        x, out, tile,
        [&](const int8_t* from, int8_t* to) {
          _mm512_store_si512(to, _mm512_shuffle_epi8(_mm512_load_si512(from), by_column));
        },
        [&](const QuantizedRows& rows, const LinearOutput& y, const Tile& part) {
          linear_by_streams<Simd>(rows, weight, y, part);
        });
  } else {
    const __m512i offset = _mm512_set1_epi8(static_cast<char>(128));
    with_changed_rows(
        x, out, tile,
        [&](const int8_t* from, int8_t* to) {
          _mm512_store_si512(to, _mm512_xor_si512(_mm512_load_si512(from), offset));
        },
        [&](const QuantizedRows& rows, const LinearOutput& y, const Tile& part) {
          linear_by_picks(rows, weight, y, part);
        });
  }
}

}  // namespace trine
