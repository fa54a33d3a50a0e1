#include "matrix_units.h"

#include <cstring>
#include <deque>
#include <type_traits>
#include <vector>

#include "common/float_types.h"
#include "emulator.h"
#include "shared_memory.h"

namespace cuda_on_cpu {
namespace {

constexpr uint32_t kWholeWarp = 0xffffffffu;
constexpr int kUnitBytes = 16;  // a row of an 8x8 matrix of 16-bit elements

struct Element {
  int row, column;
};

// PTX ISA, "Matrix Fragments for mma.m16n8k32" (8-bit types) and "... for mma.m16n8k16 with
// floating point type" (16-bit types). Element i of a lane, in the order of the bits of its words.
Element a_element(Kind kind, int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  if (kind == Kind::s8)
    return {(i < 4 || (i >= 8 && i < 12)) ? group : group + 8,
            in_group * 4 + (i & 3) + (i < 8 ? 0 : 16)};
  return {(i < 2 || (i >= 4 && i < 6)) ? group : group + 8,
          in_group * 2 + (i & 1) + (i < 4 ? 0 : 8)};
}

Element b_element(Kind kind, int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  if (kind == Kind::s8) return {in_group * 4 + (i & 3) + i / 4 * 16, group};
  return {in_group * 2 + (i & 1) + i / 2 * 8, group};
}

// Who holds the position, of two bits, of stored value `column` of a row of a sparse A. PTX ISA,
// "Matrix Fragments for sparse mma.m16n8k32" (16-bit types) and "... m16n8k64" (8-bit types); wgmma
// has the same for each warp.
struct MetadataPlace {
  int lane, bit;
};

MetadataPlace metadata_place(Kind kind, int selector, int row, int column) {
  const int group = row % 8, below = row / 8;
  if (kind == Kind::s8) return {4 * group + 2 * (column / 16) + below, 2 * (column % 16)};
  return {4 * group + 2 * selector + column / 8, 16 * below + 2 * (column % 8)};
}

int depth(Kind kind) { return kind == Kind::s8 ? 32 : 16; }

constexpr int kWarpRows = 16, kWarpsOfGroup = 4, kMostDepth = 32;

// Of each stored value of a row of A.
using Columns = int[kWarpRows][kMostDepth];

// `word_of` gives the metadata of a lane.
template <class WordOf>
void gather_columns(const char* operation, Kind kind, int selector, const WordOf& word_of,
                    Columns& columns) {
  if (kind == Kind::s8 && selector != 0) fail("%s: the selector of 8-bit types is 0", operation);
  for (int row = 0; row < kWarpRows; ++row)
    for (int i = 0; i < depth(kind); ++i) {
      const MetadataPlace at = metadata_place(kind, selector, row, i);
      columns[row][i] = i / 2 * 4 + int(word_of(at.lane) >> at.bit & 3);
      if (i % 2 == 1 && columns[row][i] <= columns[row][i - 1])
        fail("%s: positions of row %d do not ascend (lane %d, bit %d)", operation, row, at.lane,
             at.bit);
    }
}

Element sum_element(int lane, int i) {
  return {(lane >> 2) + (i < 2 ? 0 : 8), (lane % 4) * 2 + (i & 1)};
}

double value_of(Kind kind, const void* elements, int i) {
  if (kind == Kind::s8) return static_cast<const int8_t*>(elements)[i];
  const uint16_t bits = static_cast<const uint16_t*>(elements)[i];
  return kind == Kind::f16 ? double(trine::widen(trine::float16{bits}))
                           : double(trine::widen(trine::bfloat16{bits}));
}

// The unit adds float sums in an order and precision that PTX leaves open: here in double, rounded
// once. Integer sums wrap.
void add(Kind kind, void* sums, int i, double dot, bool accumulate) {
  if (kind == Kind::s8) {
    int32_t& sum = static_cast<int32_t*>(sums)[i];
    sum = int32_t(uint32_t(accumulate ? sum : 0) + uint32_t(int32_t(dot)));
  } else {
    float& sum = static_cast<float*>(sums)[i];
    sum = float((accumulate ? double(sum) : 0.0) + dot);
  }
}

unsigned char* fragment_row(uint32_t address, const char* operation) {
  return at_shared(View::threads, running_block(), address, kUnitBytes, kUnitBytes, operation);
}

struct RowPost {
  uint32_t row;
  uint32_t* words;
};

// PTX ISA, "Warp-level matrix load instruction: ldmatrix" (and stmatrix): lanes 8i to 8i + 7 bring
// the rows of matrix i; a lane's word of it is row lane / 4, bytes 4 * (lane % 4) on.
void exchange_rows(const char* operation, bool load, int matrices, uint32_t row, uint32_t* words,
                   std::source_location where) {
  RowPost post{row, words};
  meet_lanes(operation, kWholeWarp, &post, where, [&](const Posts& posts) {
    const auto post_of = [&](int lane) { return static_cast<RowPost*>(posts[lane]); };
    for (int lane = 0; lane < kLanes; ++lane)
      for (int i = 0; i < matrices; ++i) {
        unsigned char* at =
            fragment_row(post_of(8 * i + lane / 4)->row, operation) + 4 * (lane % 4);
        uint32_t* word = post_of(lane)->words + i;
        load ? std::memcpy(word, at, 4) : std::memcpy(at, word, 4);
      }
  });
}

struct MultiplyPost {
  void* sums;
  const uint32_t *a, *b;
  uint32_t metadata;
};

using LeftMatrix = double[kWarpRows][kMostDepth];
using RightMatrix = double[2 * kMostDepth][8];

const MultiplyPost& post_of(const Posts& posts, int lane) {
  return *static_cast<const MultiplyPost*>(posts[lane]);
}

// `k` rows of B, a multiple of what a lane's first two words hold.
void gather(Kind kind, const Posts& posts, int k, LeftMatrix& left, RightMatrix& right) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < kWarpRows * depth(kind) / kLanes; ++i) {
      const Element at = a_element(kind, lane, i);
      left[at.row][at.column] = value_of(kind, post_of(posts, lane).a, i);
    }
    for (int i = 0; i < k * 8 / kLanes; ++i) {
      const Element at = b_element(kind, lane, i);
      right[at.row][at.column] = value_of(kind, post_of(posts, lane).b, i);
    }
  }
}

// Adds dot(row, column) to each sum.
template <class Dot>
void add_products(Kind kind, const Posts& posts, const Dot& dot) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i) {
      const Element at = sum_element(lane, i);
      add(kind, post_of(posts, lane).sums, i, dot(at.row, at.column), true);
    }
}

// The works that a warp has given to the unit.
struct WarpUnit {
  std::vector<std::vector<Wgmma>> open;  // each of the 32 lanes
  std::deque<std::vector<std::vector<Wgmma>>> closed;
  bool fenced = false;
};
std::vector<WarpUnit> units;  // of each warp of the cluster

WarpUnit& own_unit() { return units[running_thread() / kLanes]; }

// PTX ISA, "Matrix descriptor format" and, for 128-byte swizzle and k along the rows, "Strides":
// rows of 128 bytes, groups of eight at the stride byte offset; the swizzle works on the address.
class Tile {
 public:
  explicit Tile(uint64_t descriptor)
      : start_(uint32_t(descriptor & 0x3fff) << 4),
        eight_rows_(uint32_t(descriptor >> 32 & 0x3fff) << 4) {
    if (descriptor >> 62 != 1) fail("wgmma: only tiles with the 128-byte swizzle are emulated");
    if ((start_ & ~127u) % 1024 != 0)
      fail("wgmma: the tile at shared address %#x does not begin at a multiple of 1024", start_);
  }

  void read(int row, int bytes, void* to) const {
    for (int byte = 0; byte < bytes; byte += kUnitBytes) {
      const uint32_t at =
          start_ + uint32_t(row / 8) * eight_rows_ + uint32_t(row % 8) * 128 + uint32_t(byte);
      const uint32_t unit = at ^ ((at >> 7 & 7u) << 4);
      std::memcpy(
          static_cast<unsigned char*>(to) + byte,
          at_shared(View::async_units, running_block(), unit, kUnitBytes, kUnitBytes, "wgmma"),
          kUnitBytes);
    }
  }

 private:
  uint32_t start_, eight_rows_;
};

// One warp's 16 of the 64 rows. PTX ISA, "Register fragments and shared memory matrix layouts" of
// wgmma.m64nNk32 and k16: A as for mma; sum i of a lane is in the 8 columns i / 4.
void run_wgmma(const std::vector<Wgmma>& lanes) {
  const Wgmma& first = lanes[0];
  const Kind kind = first.kind;
  const int values = depth(kind);  // of A, in a row
  const bool sparse = first.metadata != nullptr;
  const int k = sparse ? 2 * values : values;
  const int row0 = int(running_thread() % (blockDim.x * blockDim.y * blockDim.z) / kLanes) %
                   kWarpsOfGroup * kWarpRows;
  constexpr int kStepBytes = 32;
  double a[kWarpRows][kMostDepth];
  unsigned char row[2 * kStepBytes];
  Columns column_of;
  if (sparse)
    gather_columns(
        "wgmma_sparse", kind, first.selector, [&](int lane) { return *lanes[lane].metadata; },
        column_of);
  if (first.a == nullptr) {
    const Tile tile(first.a_tile);
    for (int r = 0; r < kWarpRows; ++r) {
      tile.read(row0 + r, kStepBytes, row);
      for (int i = 0; i < values; ++i) a[r][i] = value_of(kind, row, i);
    }
  } else {
    for (int lane = 0; lane < kLanes; ++lane)
      for (int i = 0; i < kWarpRows * k / kLanes; ++i) {
        const Element at = a_element(kind, lane, i);
        a[at.row][at.column] = value_of(kind, lanes[lane].a, i);
      }
  }
  const Tile b_tile(first.b_tile);
  for (int column = 0; column < first.columns; ++column) {
    double b[2 * kMostDepth];
    b_tile.read(column, sparse ? 2 * kStepBytes : kStepBytes, row);
    for (int i = 0; i < k; ++i) b[i] = value_of(kind, row, i);
    for (int r = 0; r < kWarpRows; ++r) {
      double dot = 0;
      for (int i = 0; i < values; ++i) dot += a[r][i] * b[sparse ? column_of[r][i] : i];
      const int lane = r % 8 * 4 + column % 8 / 2;
      const int i = column / 8 * 4 + r / 8 * 2 + column % 2;
      add(kind, lanes[lane].sums, i, dot, first.accumulate);
    }
  }
}

}  // namespace

void load_matrices(uint32_t* fragment, int matrices, uint32_t row, std::source_location where) {
  exchange_rows("load_matrices", true, matrices, row, fragment, where);
}

void store_matrices(uint32_t row, const uint32_t* fragment, std::source_location where) {
  exchange_rows("store_matrices", false, 4, row, const_cast<uint32_t*>(fragment), where);
}

// PTX ISA, "stmatrix", .trans: element c of row r is element r of row c of the fragments.
void store_matrices_transposed(uint32_t row, const uint32_t* fragment, std::source_location where) {
  RowPost mine{row, const_cast<uint32_t*>(fragment)};
  meet_lanes("store_matrices_transposed", kWholeWarp, &mine, where, [](const Posts& posts) {
    const auto post_of = [&](int lane) { return static_cast<RowPost*>(posts[lane]); };
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int r = 0; r < 8; ++r) {
        unsigned char* to = fragment_row(post_of(8 * matrix + r)->row, "store_matrices_transposed");
        for (int c = 0; c < 8; ++c) {
          const uint32_t word = post_of(4 * c + r / 2)->words[matrix];
          const auto element = uint16_t(word >> 16 * (r % 2));
          std::memcpy(to + 2 * c, &element, sizeof element);
        }
      }
  });
}

void multiply(Kind kind, void* sums, const uint32_t* a, const uint32_t* b,
              std::source_location where) {
  MultiplyPost mine{sums, a, b, 0};
  meet_lanes("multiply", kWholeWarp, &mine, where, [kind](const Posts& posts) {
    const int k = depth(kind);
    LeftMatrix left;
    RightMatrix right;
    gather(kind, posts, k, left, right);
    add_products(kind, posts, [&](int row, int column) {
      double dot = 0;
      for (int j = 0; j < k; ++j) dot += left[row][j] * right[j][column];
      return dot;
    });
  });
}

void multiply_sparse(Kind kind, int selector, void* sums, const uint32_t* a, const uint32_t* b,
                     uint32_t metadata, std::source_location where) {
  MultiplyPost mine{sums, a, b, metadata};
  meet_lanes("multiply_sparse", kWholeWarp, &mine, where, [kind, selector](const Posts& posts) {
    const int stored = depth(kind);
    LeftMatrix left;
    RightMatrix right;
    gather(kind, posts, 2 * stored, left, right);
    Columns column_of;
    gather_columns(
        "multiply_sparse", kind, selector, [&](int lane) { return post_of(posts, lane).metadata; },
        column_of);
    // What is not stored is not read: it may be NaN.
    add_products(kind, posts, [&](int row, int column) {
      double dot = 0;
      for (int i = 0; i < stored; ++i) dot += left[row][i] * right[column_of[row][i]][column];
      return dot;
    });
  });
}

void wgmma(const Wgmma& operands, std::source_location where) {
  Wgmma mine = operands;
  meet_lanes("wgmma", kWholeWarp, &mine, where, [](const Posts& posts) {
    if (!own_unit().fenced)
      fail("wgmma without wgmma_fence since its registers may have been touched");
    std::vector<Wgmma> lanes;
    for (const void* post : posts) lanes.push_back(*static_cast<const Wgmma*>(post));
    for (const Wgmma& lane : lanes)
      if (lane.a_tile != lanes[0].a_tile || lane.b_tile != lanes[0].b_tile)
        fail("wgmma: the lanes of a warp name different tiles");
    own_unit().open.push_back(std::move(lanes));
  });
}

void wgmma_fence(std::source_location where) {
  int nothing = 0;
  meet_lanes("wgmma_fence", kWholeWarp, &nothing, where,
             [](const Posts&) { own_unit().fenced = true; });
}

void wgmma_commit(std::source_location where) {
  int nothing = 0;
  meet_lanes("wgmma_commit", kWholeWarp, &nothing, where, [](const Posts&) {
    WarpUnit& unit = own_unit();
    unit.closed.push_back(std::move(unit.open));
    unit.open.clear();
  });
}

void wgmma_wait(unsigned pending, std::source_location where) {
  int nothing = 0;
  meet_lanes("wgmma_wait", kWholeWarp, &nothing, where, [pending](const Posts&) {
    WarpUnit& unit = own_unit();
    for (; unit.closed.size() > pending; unit.closed.pop_front())
      for (const std::vector<Wgmma>& lanes : unit.closed.front()) run_wgmma(lanes);
    unit.fenced = false;
  });
}

void begin_matrix_units(unsigned threads) { units.assign((threads + kLanes - 1) / kLanes, {}); }

}  // namespace cuda_on_cpu
