// Int8 values on AVX-512 VNNI and VBMI: only stored values are multiplied. The weight is not spread
// out to the columns of x; the columns that a weight row stores are picked from x instead:
//
//   x        64 columns, a register in which vpermb finds any byte
//   columns  where the 32 values of one weight row, and then of the next, lie among them
//   values   these values
//   acc = vpdpbusd(acc, vpermb(columns, x), values)
//
// A pick and a dot product stand for two dot products with the dense weight. x is the unsigned
// operand, by adding 128; 128 times the sum of a weight row is taken off again.
//
// With few rows of x, columns and values are put together in registers as the weight is read. With
// more, that is done once, to a panel of the dense weight's size, which stays in L2; what the next
// panel is made of is fetched from memory during the products of this one.
//
// What bounds it: with one row, the reading of the weight, 5/8 of the dense bytes (measured on Zen
// 4, from memory: 1.4 to 1.6 times as fast as the dense product, of 1.6 that the bytes allow). With
// many, the units that pick or multiply: of Zen 4's three of 256 bits, one does the one, one the
// other and one both, so 1.33 cycles for 128 columns, where the dense product takes 2. Measured at
// K = 2560: 1.46 in the tile's loop, 1.8 with all around it. Making the panels takes as long as the
// products of six rows; from memory 16 rows are 1.07 times as fast as the dense product, 32 1.2
// times, 9 rows 0.9.
#include <array>

#include "common/x86/gemm_avx512vnni.h"
#include "sparse24_linear/int8_values.h"

namespace trine {
namespace {

// Two weight rows at 64 columns, each in its half of the registers.
struct Picks {
  __m512i columns, values;
};

[[gnu::always_inline]] inline __m512i halves(__m256i low, __m256i high) {
  return _mm512_mask_broadcast_i64x4(_mm512_castsi256_si512(low), 0xf0, high);
}

// From 64 bits of indices and 32 values of each row.
[[gnu::always_inline]] inline Picks make_picks(__m128i indices0, __m128i indices1, __m256i values0,
                                               __m256i values1) {
  const __m512i indices =
      _mm512_mask_broadcastq_epi64(_mm512_broadcastq_epi64(indices0), 0xf0, indices1);
  // Byte i takes bits 2 i and 2 i + 1: the position in group i / 2.
  constexpr int64_t kBits = 0x0e0c0a0806040200, kGroups = 0x0c0c080804040000;
  constexpr int64_t kNext = 0x1010101010101010;  // eight bytes on are four groups on
  const __m512i bit = _mm512_setr_epi64(kBits, kBits + kNext, kBits + 2 * kNext, kBits + 3 * kNext,
                                        kBits, kBits + kNext, kBits + 2 * kNext, kBits + 3 * kNext);
  const __m512i group =
      _mm512_setr_epi64(kGroups, kGroups + kNext, kGroups + 2 * kNext, kGroups + 3 * kNext, kGroups,
                        kGroups + kNext, kGroups + 2 * kNext, kGroups + 3 * kNext);
  constexpr int kAndOr = 0xea;  // (a & b) | c
  return {_mm512_ternarylogic_epi32(_mm512_multishift_epi64_epi8(bit, indices), _mm512_set1_epi8(3),
                                    group, kAndOr),
          halves(values0, values1)};
}

// The packed weight as it lies. Places in a row are counted in bytes of indices: there are four
// times as many of values, and eight times as many of x, which is an address without arithmetic.
struct PackedPairs : FetchedSparse {
  static constexpr int32_t kOffset = 0;
  static constexpr int64_t kMaxTileRows = 8;
  static constexpr bool kSubtractsOffset = true;

  using Pair = std::array<SparseRow, 2>;

  int64_t row_bytes = weight.chunks * kSparse24Indices;
  int64_t whole_bytes = row_bytes / 8 * 8;

  SparseRow row(int64_t n) const { return sparse_row(weight, n); }

  [[gnu::always_inline]] static Picks load(const Pair& pair, int64_t byte) {
    const auto* values0 = reinterpret_cast<const __m256i*>(pair[0].values + 4 * byte);
    const auto* values1 = reinterpret_cast<const __m256i*>(pair[1].values + 4 * byte);
    return make_picks(_mm_loadu_si64(pair[0].indices + byte),
                      _mm_loadu_si64(pair[1].indices + byte), _mm256_loadu_si256(values0),
                      _mm256_loadu_si256(values1));
  }
  // A last chunk, half of 64 columns.
  [[gnu::always_inline]] static Picks load_tail(const Pair& pair, int64_t byte) {
    const auto* values0 = reinterpret_cast<const __m128i*>(pair[0].values + 4 * byte);
    const auto* values1 = reinterpret_cast<const __m128i*>(pair[1].values + 4 * byte);
    return make_picks(_mm_loadu_si32(pair[0].indices + byte),
                      _mm_loadu_si32(pair[1].indices + byte),
                      _mm256_zextsi128_si256(_mm_loadu_si128(values0)),
                      _mm256_zextsi128_si256(_mm_loadu_si128(values1)));
  }
};

// The same, put together: 128 bytes for each 64 columns of a pair of rows, of which the first is
// row `first_n`. Fetched ahead is the packed weight, for the next panel.
struct PanelPairs : FetchedSparse {
  static constexpr int32_t kOffset = 0;
  static constexpr int64_t kMaxTileRows = 8;
  static constexpr bool kSubtractsOffset = false;
  using Pair = const __m512i*;

  const __m512i* data;
  int64_t steps;  // of 64 columns
  int64_t first_n;
  int64_t whole_bytes = 8 * steps;

  Pair pair(int64_t n) const { return data + (n - first_n) / 2 * (2 * steps); }
  [[gnu::always_inline]] static Picks load(Pair pair, int64_t byte) {
    return {pair[byte / 4], pair[byte / 4 + 1]};
  }
  static Picks load_tail(Pair pair, int64_t byte) { return load(pair, byte); }
};

// How far ahead each of four streams is fetched, where one row of x passes. Eight sequences, with
// the indices, are more than the processor's prefetchers follow; measured on Zen 4, 256 and 512
// bytes make it 1.1 times as fast, 2 KiB and more slow it down.
constexpr int64_t kStreamAheadBytes = 256;

// gcc would rather load an operand from L1 again at each use than keep it.
[[gnu::always_inline]] inline __m512i in_register(__m512i v) {
  asm("" : "+v"(v));
  return v;
}

// Four rows of two sums, to four rows of four.
[[maybe_unused]] inline __m512i sum_halves(const Int32x16 (&a)[2], const Int32x16 (&b)[2],
                                           const Int32x16 (&c)[2], const Int32x16 (&d)[2]) {
  const __m512i ab =
      sum_within_quarters((__m512i)a[0], (__m512i)a[1], (__m512i)b[0], (__m512i)b[1]);
  const __m512i cd =
      sum_within_quarters((__m512i)c[0], (__m512i)c[1], (__m512i)d[0], (__m512i)d[1]);
  // Quarters of `sums`: the first rows of ab, the second rows of ab, and so of cd.
  const __m512i sums =
      _mm512_add_epi32(_mm512_shuffle_i64x2(ab, cd, 0x88), _mm512_shuffle_i64x2(ab, cd, 0xdd));
  return _mm512_permutexvar_epi32(
      _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15), sums);
}

// Rows n and n + 1. Rows beyond the last repeat it; their sums are never read.
template <class Weight>
typename Weight::Pair pair_at(const Weight& weight, int64_t n, int64_t last_n) {
  return {weight.row(std::min(n, last_n)), weight.row(std::min(n + 1, last_n))};
}
[[maybe_unused]] inline PanelPairs::Pair pair_at(const PanelPairs& weight, int64_t n,
                                                 int64_t last_n) {
  return weight.pair(std::min(n, last_n));
}

template <int kRows, class Weight>
  requires requires { Weight::kSubtractsOffset; }
void accumulate_tile(const Weight& weight, const TileRows& x, int64_t n, int64_t last_n,
                     const Slice& k, int32_t* sums) {
  static_assert(kTileColumns == 4);
  const auto pair0 = pair_at(weight, n, last_n), pair1 = pair_at(weight, n + 2, last_n);
  constexpr int kFours = (kRows + 3) / 4;
  Int32x16 acc[4 * kFours][2], offset[2] = {};
  unrolled<4 * kFours>([&](auto i) { acc[i][0] = acc[i][1] = Int32x16{}; });
  const auto step = [&](int64_t byte, const Picks& picks0,
                        const Picks& picks1) __attribute__((always_inline)) {
    const __m512i values0 = in_register(picks0.values), values1 = in_register(picks1.values);
    unrolled<kRows>([&](auto i) __attribute__((always_inline)) {
      const __m512i q = in_register(_mm512_load_si512(x.q + i * x.stride + 8 * byte));
      acc[i][0] = dot(acc[i][0], _mm512_permutexvar_epi8(picks0.columns, q), values0);
      acc[i][1] = dot(acc[i][1], _mm512_permutexvar_epi8(picks1.columns, q), values1);
    });
    if constexpr (Weight::kSubtractsOffset) {
      const __m512i offsets = _mm512_set1_epi8(static_cast<char>(128));
      offset[0] = dot(offset[0], offsets, values0);
      offset[1] = dot(offset[1], offsets, values1);
    }
  };

  const int64_t end = k.end / 8, whole_end = std::min(end, weight.whole_bytes);
  int64_t byte = k.begin / 8;
  for (; byte < whole_end; byte += 8) {
    if constexpr (FetchedAhead<Weight>)
      fetch_step(weight, x, 8 * byte - k.begin);
    else if constexpr (std::is_same_v<Weight, FourStreams<PackedPairs>>)
      for (const auto& row : {pair0[0], pair0[1], pair1[0], pair1[1]}) {
        _mm_prefetch(row.values + 4 * byte + kStreamAheadBytes, _MM_HINT_T0);
        if (byte % 64 == 0) _mm_prefetch(row.indices + byte + kStreamAheadBytes / 4, _MM_HINT_T0);
      }
    step(byte, weight.load(pair0, byte), weight.load(pair1, byte));
  }
  if (byte < end) step(byte, weight.load_tail(pair0, byte), weight.load_tail(pair1, byte));

  if constexpr (Weight::kSubtractsOffset)
    unrolled<kRows>([&](auto i) {
      acc[i][0] -= offset[0];
      acc[i][1] -= offset[1];
    });
  unrolled<kFours>([&](auto four) {
    constexpr int first = 4 * four;
    const __m512i sum = sum_halves(acc[first], acc[first + 1], acc[first + 2], acc[first + 3]);
    unrolled<std::min(4, kRows - first)>([&](auto i) {
      auto* row = reinterpret_cast<__m128i*>(sums + (first + i) * kMaxBlockColumns);
      _mm_store_si128(row, _mm_add_epi32(_mm_load_si128(row), _mm512_extracti32x4_epi32(sum, i)));
    });
  });
}

// How many rows' pages are touched together while a panel is made.
constexpr int64_t kTouchedRows = 16;

// Puts rows n .. n_end - 1 together; minus[i] = 128 * the sum of row n + i.
void make_panel(const PackedPairs& weight, int64_t n, int64_t n_end, __m512i* to, int32_t* minus) {
  const __m512i offsets = _mm512_set1_epi8(static_cast<char>(128));
  for (; n < n_end; n += 2, minus += 2) {
    const auto pair = pair_at(weight, n, n_end - 1);
    Int32x16 sum{};
    const auto write = [&](const Picks& picks) {
      *to++ = picks.columns;
      *to++ = picks.values;
      sum = dot(sum, offsets, picks.values);
    };
    const int64_t ahead = n * weight.row_length() + 2 * kAheadBytes;
    if (n % kTouchedRows == 0) weight.touch(ahead, kTouchedRows * weight.row_length());
    for (int64_t byte = 0; byte < weight.whole_bytes; byte += 8) {
      weight.prefetch(ahead + 16 * byte, 2);
      write(weight.load(pair, byte));
    }
    if (weight.whole_bytes < weight.row_bytes) write(weight.load_tail(pair, weight.whole_bytes));
    minus[0] = _mm512_mask_reduce_add_epi32(0x00ff, (__m512i)sum);
    minus[1] = _mm512_mask_reduce_add_epi32(0xff00, (__m512i)sum);
  }
}

}  // namespace

void sparse24_int8_avx512vbmi(const QuantizedRows& x, const Sparse24Int8Weight& weight,
                              const LinearOutput& out, const Tile& tile) {
  const PackedPairs packed{{weight}};
  const int64_t k = weight.chunks * kSparse24Columns;
  const int64_t first_m = tile.m_begin, rows = tile.m_end - first_m;
  const Scratch storage(rows * x.stride);
  auto* q = storage.data<int8_t>();
  for (int64_t at = 0; at < rows * x.stride; at += 64)
    _mm512_store_si512(q + at, _mm512_xor_si512(_mm512_load_si512(x.q + first_m * x.stride + at),
                                                _mm512_set1_epi8(static_cast<char>(128))));
  // From here on, row 0 is the tile's first.
  const QuantizedRows unsigned_x{q, x.stride, x.scale + first_m, x.sum + first_m};
  const int64_t row_bytes = out.stride * (out.type == FloatType::float32 ? 4 : 2);
  const LinearOutput y{static_cast<char*>(out.y) + first_m * row_bytes, out.stride, out.type,
                       out.bias};
  if (rows <= PackedPairs::kMaxTileRows)
    return integer_linear(unsigned_x, packed, k, {weight.scale}, y,
                          {0, rows, tile.n_begin, tile.n_end});

  const int64_t steps = (k + 63) / 64, columns = block_columns(k);
  const Scratch panel_storage(columns * (64 * steps + int64_t(sizeof(int32_t))));
  auto* data = panel_storage.data<__m512i>();
  auto* minus = reinterpret_cast<int32_t*>(data + columns * steps);
  for (int64_t n = tile.n_begin; n < tile.n_end; n += columns) {
    const int64_t n_end = std::min(n + columns, tile.n_end);
    make_panel(packed, n, n_end, data, minus);
    few_rows_block(unsigned_x, PanelPairs{{weight}, data, steps, n}, k, minus, {weight.scale}, y,
                   {0, rows, n, n_end},
                   Ahead(packed, n_end, std::min(n_end + columns, tile.n_end)));
  }
}

}  // namespace trine
