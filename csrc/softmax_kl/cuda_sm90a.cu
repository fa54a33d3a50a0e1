// softmax_kl and its gradient in one pass over memory: a cluster of one to eight blocks holds a row
// of the student and one of the teacher in its shared memory. The blocks sum what each has, read
// each other's sums, and write the gradient from what lies on the chip.
//
// Bytes of a class in bf16: 2 + 2 read, 2 written. That is the floor; two passes move 10, 1.67
// times as many. As calculated, none of it measured: at 6 bytes a class an H200's SM (of 132, 1.75
// GHz, 4.2 TB/s as copies reach) starts 43 instructions a lane in memory's time. A plain KL's take
// 17 for the sums and 21 for the gradient, and a few to park: issue is 0.9 of memory's time,
// exponentials (four) 0.74. A block is busy with the one and then with the other, and between them
// waits for its cluster; so where registers and shared memory allow, three blocks share an SM (two
// of everything but a plain KL of 16 bits), with up to 64 KB each on their way: 128256 classes in
// bf16 are 513 KB, eight blocks' 64. Longer rows, and fp32, take an SM a block, where little
// overlaps: still 6 and 12 bytes, in the time of 8 and 16 or so.
#include "common/cuda/barrier.cuh"
#include "common/cuda/cluster_memory.cuh"
#include "common/cuda/launch.cuh"
#include "softmax_kl/gradient.cuh"
#include "softmax_kl/parked.cuh"
#include "softmax_kl/variants.h"

namespace trine {
namespace {

constexpr int kMostBlocks = 8;  // of a cluster that every GPU starts
// Of the block's shared memory, at most: arrays of sums.
constexpr int kBytesOfArrays = 2 << 10;

// What each block of the cluster brings, in lanes 0 to 7, and again in each following eight; `none`
// for blocks beyond the cluster. Once for each T.
template <class T>
__device__ __forceinline__ T of_each_block(const T& own, int blocks, const T& none) {
  TRINE_SHARED_ARRAY(T, shared, 1);
  if (threadIdx.x == 0) shared[0] = own;
  cluster_sync();
  const int rank = int(threadIdx.x) % kMostBlocks;
  return rank < blocks ? remote_value(shared, uint32_t(rank)) : none;
}

template <bool kPrecise>
__device__ __forceinline__ Sums<double> of_cluster(const SoftmaxKlOnDevice& problem,
                                                   const Sums<double>& own, int blocks) {
  if (blocks == 1) return own;
  Sums<double> sums = of_each_block(own, blocks, Sums<double>{kNone, kNone, 0, 0, 0, 0, 0, 0});
  combine_lanes<kPrecise, kMostBlocks>(problem, sums);
  return sums;
}

__device__ __forceinline__ Totals<4> of_cluster(const Totals<4>& own, int blocks) {
  if (blocks == 1) return own;
  Totals<4> totals = of_each_block(own, blocks, Totals<4>{});
  add_up_lanes<kMostBlocks>(totals);
  return totals;
}

// Classes of a block: whole chunks.
__host__ __device__ inline int classes_of_block(int classes, int blocks) {
  const int chunks = (classes + kChunk - 1) / kChunk;
  return (chunks + blocks - 1) / blocks * kChunk;
}

template <bool kGeneral, bool kPrecise>
__global__ void __launch_bounds__(kThreads, kBlocks<kGeneral, kPrecise>)
    softmax_kl_one_pass_kernel(SoftmaxKlOnDevice problem, int blocks, GradientOnDevice to,
                               float* soft, float* hard, SavedRow* saved) {
  TRINE_DYNAMIC_SHARED(memory);
  const RowGroup group = group_of(problem.classes, blockIdx.x / blocks);
  const int64_t m = group.row;
  if (m >= problem.rows) return;
  const int rank = int(blockIdx.x % blocks), classes = classes_of_block(problem.classes, blocks);
  const int end = (rank + 1) * classes < problem.classes ? (rank + 1) * classes : problem.classes;
  const int begin = rank * classes < end ? rank * classes : end;
  const bool of_first = !problem.reversed, writes = rank == 0 && group.rank == 0;
  const LogitsOnDevice side = of_first ? problem.first : problem.second;
  const LogitsRow out(to.gradient, side.type, m * to.width);
  if (rank == blocks - 1) fill_with_zeros(out, group, problem.classes, int(to.width));
  if (problem.classes == 0 || !counts(problem, m)) {
    fill_with_zeros(out, group, begin, end);
    if (writes) write_skipped(problem, m, soft, hard, saved);
    return;
  }

  const Rows<kGeneral, kPrecise> rows(problem, m);
  const Span span(begin, end, rows.first, rows.second, out);
  const ParkedRows<kGeneral, kPrecise> parked(rows, span, group, memory);
  const Factors factors(problem, side, to, m);
  float class_0 = 0, of_label = 0;
  if (problem.hard.labels != nullptr) {
    const int64_t label = problem.hard.labels[m];
    class_0 = rows.student_at(0);
    if (label >= 0 && label < problem.classes) of_label = rows.student_at(int(label));
  }
  Summing<kPrecise> summing(problem, class_0);
  parked.visit_arriving([&](const auto& a, const auto& b, int j) { summing.add(a, b, j); });
  const Sums<double> sums =
      of_cluster<kPrecise>(problem, combined<kPrecise>(problem, group, summing.sums), blocks);

  SavedRow row = row_of(sums);
  float loss = kLn2 * (row.second_mean + row.log2_ratio);
  if constexpr (kGeneral)
    if (problem.divergence.kind != Divergence::kullback_leibler)
      loss = finish_slopes<kPrecise>(
          problem, [&](const auto& visit) { parked.visit(visit); },
          [&](const Totals<4>& own) { return of_cluster(added_up(group, own), blocks); }, &row);
  if (blocks > 1) cluster_arrive();  // this block has read what others hold
  float of_labels = 0;
  if (problem.hard.labels != nullptr)
    of_labels = finish_hard<kPrecise>(
        problem, sums, m, summing.class_0, [&](int) { return of_label; }, &row);
  if (writes) {
    soft[m] = not_negative(loss);
    if (problem.hard.labels != nullptr) hard[m] = of_labels;
    saved[m] = row;
  }
  if (factors.are_zero())
    fill_with_zeros(out, group, begin, end);
  else
    parked.visit(WriteGradient<kGeneral, kPrecise>(problem, row, factors, of_first, m, out));
  if (blocks > 1) cluster_wait();  // the others have read what this block holds
}

// Of a row; 0: none fits.
struct Team {
  int blocks, dynamic_bytes;
};

template <bool kGeneral, bool kPrecise>
Team team_of(int classes) {
  const int most = most_shared_bytes();
  const auto room = [most](int shared_by) {
    constexpr int kOfSystem = 1 << 10;  // for each block; an SM has as much more than a block gets
    return (most + kOfSystem) / shared_by - kOfSystem - kBytesOfArrays;
  };
  const bool is_warp = threads_of_row(classes) == kWarpThreads;
  Team team = {0, 0};
  for (int blocks = 1; blocks <= (is_warp ? 1 : kMostBlocks); blocks *= 2) {
    const int of_block = classes_of_block(classes, blocks);
    // Parts of a row are a block's however short.
    const int bytes = bytes_of_parked<kPrecise>(of_block, threads_of_row(classes));
    if (bytes <= room(1)) team = {blocks, bytes};
    if (bytes <= room(kBlocks<kGeneral, kPrecise>)) break;
  }
  return team;
}

}  // namespace

bool softmax_kl_one_pass_cuda(const SoftmaxKlOnDevice& problem, float* soft, float* hard,
                              SavedRow* saved, const GradientOnDevice& gradient,
                              cudaStream_t stream) {
  if (problem.top_k.given) return false;
  bool fits = true;
  with_variant(problem, [&]<bool kGeneral, bool kPrecise>() {
    const Team team = team_of<kGeneral, kPrecise>(problem.classes);
    fits = team.blocks > 0;
    if (!fits || problem.rows == 0) return;
    const int rows = kThreads / threads_of_row(problem.classes);  // of a block
    const int64_t blocks = (problem.rows + rows - 1) / rows * team.blocks;
    launch("softmax_kl", softmax_kl_one_pass_kernel<kGeneral, kPrecise>,
           {blocks, kThreads, team.dynamic_bytes, team.blocks}, stream, problem, team.blocks,
           gradient, soft, hard, saved);
  });
  return fits;
}

}  // namespace trine
