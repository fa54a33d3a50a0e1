// x86 without VBMI: blocks of weight rows are decoded to packed rows of ternary_linear, whose
// kernel then goes on as if they had been that.
//
// A decoded byte is a group: bits 2p, 2p + 1 are the code of its column p. In ternary_linear they
// are of column 4p + j in byte j of a word, so the activations are brought into that order: each 16
// columns as a 4 x 4 matrix, transposed.
//
// What bounds it: what bounds ternary_linear, and the decoding: 17 instructions for 128 weights,
// five cycles on four ports, once for all rows. With one row that takes longer than reading their
// 24 bytes: as ternary_linear is faster there, this form is for the memory that it saves.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "common/changed_rows.h"
#include "common/gemm_blocking.h"
#include "ternary24_linear/ternary24_linear.h"
#include "ternary_linear/ternary_linear.h"

namespace trine {
namespace {

struct Table16 {
  alignas(16) uint8_t entry[16];
};
template <class Entry>
constexpr Table16 make_table16(const Entry& entry) {
  Table16 table{};
  for (uint32_t i = 0; i < 16; ++i) table.entry[i] = static_cast<uint8_t>(entry(i & 7));
  return table;
}
inline constexpr Table16 kFirstValues = make_table16(ternary24_first_value);
inline constexpr Table16 kSecondValues = make_table16(ternary24_second_value);

[[maybe_unused]] inline __m256i both_halves(const Table16& table) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table.entry)));
}

// The codes of 32 groups, from 24 bytes; reads 28.
[[maybe_unused]] inline __m256i decode_groups(const uint8_t* packed) {
  const auto load = [](const uint8_t* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  };
  // Four groups are three bytes: a dword of which the low half is bytes 0 and 1, the high 1 and 2.
  const __m256i halves =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11));
  const __m256i bits =
      _mm256_shuffle_epi8(_mm256_setr_m128i(load(packed), load(packed + 12)), halves);
  // Groups 0 and 1 are bits 0 and 6 of the low half, groups 2 and 3 bits 4 and 10 of the high one.
  constexpr int kHighHalves = 0xaa;
  const __m256i even = _mm256_blend_epi16(bits, _mm256_srli_epi32(bits, 4), kHighHalves);
  const __m256i odd =
      _mm256_blend_epi16(_mm256_slli_epi32(bits, 2), _mm256_srli_epi32(bits, 2), kHighHalves);
  const __m256i groups = _mm256_or_si256(_mm256_and_si256(even, _mm256_set1_epi16(0x003f)),
                                         _mm256_and_si256(odd, _mm256_set1_epi16(0x3f00)));
  // A look-up heeds four bits; the fourth makes no difference.
  const __m256i second = _mm256_and_si256(_mm256_srli_epi16(groups, 3), _mm256_set1_epi8(7));
  return _mm256_xor_si256(_mm256_or_si256(_mm256_shuffle_epi8(both_halves(kFirstValues), groups),
                                          _mm256_shuffle_epi8(both_halves(kSecondValues), second)),
                          _mm256_set1_epi8(kTernary24Flip));
}

// Writes `bytes` codes of four, and up to 31 more.
[[maybe_unused]] inline void decode_row(const uint8_t* packed, int64_t stride, int64_t bytes,
                                        uint8_t* to) {
  const auto store = [&](const uint8_t* from) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), decode_groups(from));
    to += 32;
    bytes -= 32;
  };
  int64_t at = 0;
  for (; bytes > 0 && at + 28 <= stride; at += 24) store(packed + at);
  if (bytes <= 0) return;
  uint8_t rest[56] = {};  // at most 27 bytes, two times 24
  std::memcpy(rest, packed + at, stride - at);
  store(rest);
  if (bytes > 0) store(rest + 24);
}

// All of `tile`, by a kernel of ternary_linear.
[[maybe_unused]] inline void linear_by_panel(TernaryLinearFn* multiply, const QuantizedRows& x,
                                             const Ternary24Weight& weight, const LinearOutput& out,
                                             const Tile& tile) {
  const __m256i transposed = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const auto transpose = [&](const int8_t* from, int8_t* to) {
    for (int half = 0; half < 64; half += 32)
      _mm256_store_si256(
          reinterpret_cast<__m256i*>(to + half),
          _mm256_shuffle_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(from + half)),
                              transposed));
  };
  const int64_t stride = round_up(weight.k, kTernaryChunk) / kTernaryPerByte;
  const int64_t columns = block_columns(stride),
                value_bytes = out.type == FloatType::float32 ? 4 : 2;
  const Scratch storage(columns * stride + 32);
  auto* panel = storage.data<uint8_t>();
  with_changed_rows(
      x, out, tile, transpose,
      [&](const QuantizedRows& rows, const LinearOutput& y, const Tile& part) {
        for (int64_t n = part.n_begin; n < part.n_end; n += columns) {
          const int64_t count = std::min(columns, part.n_end - n);
          for (int64_t i = 0; i < count; ++i)
            decode_row(weight.packed + (n + i) * weight.stride, weight.stride, stride,
                       panel + i * stride);
          multiply(rows,
                   {panel, stride, weight.k, weight.per_tensor ? weight.scale : weight.scale + n,
                    weight.per_tensor, 0},
                   {static_cast<char*>(y.y) + n * value_bytes, y.stride, y.type,
                    y.bias == nullptr ? nullptr : y.bias + n},
                   {part.m_begin, part.m_end, 0, count});
        }
      });
}

}  // namespace
}  // namespace trine
