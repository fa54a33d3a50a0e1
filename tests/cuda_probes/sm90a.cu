// What the copy engine, stmatrix and wgmma do on sm_90a, as bytes of tiles and as products. Prints
// raw results, the same on a GPU and under the emulation.
#include <cstdlib>

#include "common/cuda/barrier.cuh"
#include "common/cuda/cluster_memory.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/tma.cuh"
#include "common/cuda/wgmma.cuh"
#include "probe_memory.cuh"

namespace {

using namespace trine;

constexpr int kRows = 300, kRowBytes = 208;  // one tile and a half in each direction
constexpr int kTileRows = 256, kTileBytes = kTileRows * kTileRowBytes;
constexpr int kSmallRows = 64, kSmallBytes = kSmallRows * kTileRowBytes;

// A tile that reaches beyond the matrix, byte by byte as it lies.
__global__ void __launch_bounds__(128)
    probe_load_tile(const __grid_constant__ TensorMap map, unsigned char* out) {
  TRINE_DYNAMIC_SHARED(tile);
  TRINE_SHARED_ARRAY(Mbarrier, landed, 1);
  const SharedAddress barrier = shared_address(landed);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  for (int part = 0; part < 2; ++part) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(barrier, kTileBytes);
      load_tile(shared_address(tile), map, part * kTileRowBytes, part * kTileRows, barrier);
    }
    mbarrier_wait(barrier, uint32_t(part));
    for (int i = int(threadIdx.x); i < kTileBytes; i += 128) out[part * kTileBytes + i] = tile[i];
    __syncthreads();
  }
}

// Each block of a pair loads half of a tile into both; then each arrives at the other's barrier.
__global__ void __launch_bounds__(32)
    probe_multicast(const __grid_constant__ TensorMap map, unsigned char* out) {
  TRINE_DYNAMIC_SHARED(tile);
  TRINE_SHARED_ARRAY(Mbarrier, barriers, 2);
  const SharedAddress landed = shared_address(barriers), done = shared_address(barriers + 1);
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    mbarrier_init(landed, 1);
    mbarrier_init(done, 1);
    fence_mbarrier_init();
  }
  cluster_sync();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(landed, 2 * kSmallBytes);
    load_tile_multicast(shared_address(tile) + rank * kSmallBytes, map, 0, int(rank) * kSmallRows,
                        landed, 3);
  }
  mbarrier_wait(landed, 0);
  for (int i = int(threadIdx.x); i < 2 * kSmallBytes; i += 32)
    out[rank * 2 * kSmallBytes + i] = tile[i];
  __syncthreads();
  if (threadIdx.x == 0) mbarrier_arrive_remote(done, rank ^ 1u);
  mbarrier_wait(done, 0);
}

constexpr int kMostBlocks = 8;

struct TwoWords {
  uint64_t first, second;
};

// Each lane reads what the block `lane` places on has, and stays until the others have, too.
__global__ void __launch_bounds__(32) probe_remote_value(TwoWords* out) {
  TRINE_SHARED_ARRAY(TwoWords, own, 2);
  const uint32_t lane = threadIdx.x, rank = cluster_rank();
  if (lane < 2) own[lane] = {100 * rank + lane, ~uint64_t(100 * rank + lane)};
  cluster_sync();
  const TwoWords found = remote_value(own + lane % 2, (rank + lane) % kMostBlocks);
  cluster_arrive();
  out[32 * blockIdx.x + lane] = found;
  cluster_wait();
}

// Fragments whose bytes count up, through stmatrix and the copy engine into the matrix's corner.
__global__ void __launch_bounds__(32) probe_store_tile(const __grid_constant__ TensorMap map) {
  TRINE_DYNAMIC_SHARED(tile);
  const uint32_t lane = threadIdx.x;
  for (uint32_t unit = 0; unit < kSmallRows * 8; unit += 32) {
    uint32_t fragment[4];
    for (uint32_t i = 0; i < 4; ++i) fragment[i] = (unit + lane) * 0x01010101u + i * 0x11223344u;
    store_matrices(swizzled(shared_address(tile) + (unit + lane) * 16), fragment);
  }
  fence_async_proxy();
  __syncthreads();
  if (lane == 0) {
    store_tile(map, kTileRowBytes, kTileRows, shared_address(tile));
    store_tile_commit();
    store_tile_wait_read<0>();
  }
}

// A tile of A and one of B, for all threads of the block.
__device__ void load_operands(SharedAddress a_tile, SharedAddress b_tile, const TensorMap& a_map,
                              const TensorMap& b_map) {
  TRINE_SHARED_ARRAY(Mbarrier, landed, 1);
  const SharedAddress barrier = shared_address(landed);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, kSmallBytes + kTileBytes);
    load_tile(a_tile, a_map, 0, 0, barrier);
    load_tile(b_tile, b_map, 0, 0, barrier);
  }
  mbarrier_wait(barrier, 0);
}

// The product of two tiles over their 128 bytes of k: A from shared memory, then from registers,
// each added to what is there.
template <class Operands, class Sum, int kColumns>
__global__ void __launch_bounds__(128)
    probe_wgmma(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                Sum* out) {
  TRINE_DYNAMIC_SHARED(tiles);
  const SharedAddress a_tile = shared_address(tiles), b_tile = a_tile + kSmallBytes;
  load_operands(a_tile, b_tile, a_map, b_map);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  uint32_t a[4][4];  // of each k step
  for (int step = 0; step < 4; ++step)
    load_matrices(a[step], swizzled(a_tile + uint32_t((16 * warp + lane % 16) * kTileRowBytes +
                                                      32 * step + 16 * (lane / 16))));
  Sum sums[kColumns / 2];
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step)
    wgmma(Operands{}, sums, tile_descriptor(a_tile + 32 * step),
          tile_descriptor(b_tile + 32 * step), step > 0);
#pragma unroll
  for (int step = 0; step < 4; ++step)
    wgmma(Operands{}, sums, a[step], tile_descriptor(b_tile + 32 * step), true);
  wgmma_commit();
  wgmma_wait<0>();
  touch(sums);
  for (int i = 0; i < kColumns / 2; ++i) out[threadIdx.x * (kColumns / 2) + i] = sums[i];
}

// Four matrices of 16-bit elements that count up, stored transposed.
__global__ void __launch_bounds__(32) probe_store_transposed(uint32_t* out) {
  TRINE_SHARED_ARRAY(uint4, rows, 32);
  const uint32_t lane = threadIdx.x;
  uint32_t fragment[4];
  for (uint32_t i = 0; i < 4; ++i) fragment[i] = 0x00010000u + 0x00020002u * (32 * i + lane);
  store_matrices_transposed(shared_address(rows + lane), fragment);
  __syncthreads();
  for (uint32_t i = 0; i < 4; ++i)
    out[4 * lane + i] = reinterpret_cast<uint32_t*>(rows)[4 * lane + i];
}

// Metadata of no obvious pattern: each nibble one of the six that are defined.
__device__ uint32_t some_metadata(uint32_t thread, uint32_t step) {
  uint32_t state = thread * 2 + step, word = 0;
  for (int nibble = 0; nibble < 8; ++nibble) {
    state = state * 1664525u + 1013904223u;
    word = word << 4 | (0xed9c84u >> (state >> 24) % 6 * 4 & 15u);
  }
  return word;
}

// The product of a sparse tile of A, its first 64 bytes, and one of B over its 128 bytes.
template <class Operands, class Sum, int kColumns, int kSelector>
__global__ void __launch_bounds__(128)
    probe_wgmma_sparse(const __grid_constant__ TensorMap a_map,
                       const __grid_constant__ TensorMap b_map, Sum* out) {
  TRINE_DYNAMIC_SHARED(tiles);
  const SharedAddress a_tile = shared_address(tiles), b_tile = a_tile + kSmallBytes;
  load_operands(a_tile, b_tile, a_map, b_map);
  const uint32_t metadata[2] = {some_metadata(threadIdx.x, 0), some_metadata(threadIdx.x, 1)};
  Sum sums[kColumns / 2];
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 2; ++step)
    wgmma_sparse<kSelector>(Operands{}, sums, tile_descriptor(a_tile + 32 * step),
                            tile_descriptor(b_tile + 64 * step), metadata[step], step > 0);
  wgmma_commit();
  wgmma_wait<0>();
  touch(sums);
  for (int i = 0; i < kColumns / 2; ++i) out[threadIdx.x * (kColumns / 2) + i] = sums[i];
}

template <class Operands, class Sum, int kColumns, int kSelector>
void print_wgmma_sparse(const TensorMap& a, const TensorMap& b) {
  ProbeMemory sums(128 * kColumns / 2 * sizeof(Sum));
  launch("probe", probe_wgmma_sparse<Operands, Sum, kColumns, kSelector>,
         {1, 128, kSmallBytes + kTileBytes}, nullptr, a, b, sums.data<Sum>());
  sums.print();
}

// `count_up` holds the numbers from 1 on in each row, `diagonal` 1 where row and k are the same: so
// a sum tells which stored value, from 1 on, the metadata sent to the k that is its column.
template <class Operands, class Sum, int kSelectors>
void print_wgmmas_sparse(const TensorMap& a, const TensorMap& b, const TensorMap& count_up,
                         const TensorMap& diagonal) {
  print_wgmma_sparse<Operands, Sum, 128, 0>(count_up, diagonal);
  print_wgmma_sparse<Operands, Sum, 128, kSelectors - 1>(count_up, diagonal);
  print_wgmma_sparse<Operands, Sum, 64, 0>(a, b);
  print_wgmma_sparse<Operands, Sum, 128, 0>(a, b);
  print_wgmma_sparse<Operands, Sum, 176, kSelectors - 1>(a, b);
  print_wgmma_sparse<Operands, Sum, 192, 0>(a, b);
}

template <class Operands, class Sum, int kColumns>
void print_wgmma(const TensorMap& a, const TensorMap& b) {
  ProbeMemory sums(128 * kColumns / 2 * sizeof(Sum));
  launch("probe", probe_wgmma<Operands, Sum, kColumns>, {1, 128, kSmallBytes + kTileBytes}, nullptr,
         a, b, sums.data<Sum>());
  sums.print();
}

template <class Operands, class Sum>
void print_wgmmas(const TensorMap& a, const TensorMap& b) {
  print_wgmma<Operands, Sum, 8>(a, b);
  print_wgmma<Operands, Sum, 16>(a, b);
  print_wgmma<Operands, Sum, 32>(a, b);
  print_wgmma<Operands, Sum, 64>(a, b);
  print_wgmma<Operands, Sum, 128>(a, b);
  print_wgmma<Operands, Sum, 256>(a, b);
}

// Element i is `number`, a byte (kind 0) or a small whole number in float16 (1) or bfloat16 (2).
void put(ProbeMemory& memory, int i, int kind, int number) {
  if (kind == 0) {
    memory.data<uint8_t>()[i] = uint8_t(number);
    return;
  }
  const float value = float(number);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (kind == 1 && bits != 0)
    bits = ((bits >> 13 & 0x3ffu) | ((bits >> 23) - 127 + 15) << 10) << 16;
  memory.data<uint16_t>()[i] = uint16_t(bits >> 16);
}

// Bytes, or the numbers 0 to 15 in a 16-bit type, of no obvious pattern.
void fill(ProbeMemory& memory, int count, int kind) {
  uint32_t state = 1;
  for (int i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    const int number = int(state >> 24);
    put(memory, i, kind, kind == 0 ? number : number % 16);
  }
}

}  // namespace

int main() {
  ProbeMemory matrix(kRows * kRowBytes);
  fill(matrix, kRows * kRowBytes, 0);
  const TensorMap map =
      make_tensor_map("probe", matrix.data<void>(), kRows, kRowBytes, kRowBytes, kTileRows);
  ProbeMemory tiles(2 * kTileBytes);
  launch("probe", probe_load_tile, {1, 128, kTileBytes}, nullptr, map, tiles.data<unsigned char>());
  tiles.print();

  const TensorMap small =
      make_tensor_map("probe", matrix.data<void>(), kRows, kRowBytes, kRowBytes, kSmallRows);
  ProbeMemory pairs(4 * kSmallBytes);
  launch("probe", probe_multicast, {2, 32, 2 * kSmallBytes, 2}, nullptr, small,
         pairs.data<unsigned char>());
  pairs.print();

  launch("probe", probe_store_tile, {1, 32, kSmallBytes}, nullptr, small);
  matrix.print();

  ProbeMemory remote(kMostBlocks * 32 * sizeof(TwoWords));
  launch("probe", probe_remote_value, {kMostBlocks, 32, 0, kMostBlocks}, nullptr,
         remote.data<TwoWords>());
  remote.print();

  ProbeMemory transposed(32 * 16);
  launch("probe", probe_store_transposed, {1, 32}, nullptr, transposed.data<uint32_t>());
  transposed.print();

  for (int kind = 0; kind < 3; ++kind) {
    ProbeMemory a(kSmallBytes), b(kTileBytes), count_up(kSmallBytes), diagonal(kTileBytes);
    const int width = kind == 0 ? kTileRowBytes : kTileRowBytes / 2;
    fill(a, kSmallRows * width, kind);
    fill(b, kTileRows * width, kind);
    for (int i = 0; i < kSmallRows * width; ++i) put(count_up, i, kind, i % width + 1);
    for (int i = 0; i < kTileRows * width; ++i) put(diagonal, i, kind, i / width == i % width);
    const auto map_of = [](const ProbeMemory& tile, int rows) {
      return make_tensor_map("probe", tile.data<void>(), rows, kTileRowBytes, kTileRowBytes, rows);
    };
    const TensorMap a_map = map_of(a, kSmallRows), b_map = map_of(b, kTileRows);
    const TensorMap up_map = map_of(count_up, kSmallRows), one_map = map_of(diagonal, kTileRows);
    a.print();
    b.print();
    if (kind == 0) print_wgmmas<S8, int32_t>(a_map, b_map);
    if (kind == 1) print_wgmmas<F16, float>(a_map, b_map);
    if (kind == 2) print_wgmmas<Bf16, float>(a_map, b_map);
    if (kind == 0) print_wgmmas_sparse<S8, int32_t, 1>(a_map, b_map, up_map, one_map);
    if (kind == 1) print_wgmmas_sparse<F16, float, 2>(a_map, b_map, up_map, one_map);
    if (kind == 2) print_wgmmas_sparse<Bf16, float, 2>(a_map, b_map, up_map, one_map);
  }
}
