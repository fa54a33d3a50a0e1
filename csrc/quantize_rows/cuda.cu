// quantize_rows for every GPU from sm_80 on: memory-bound, so each value is read once and kept in
// registers between the two steps, the row's largest magnitude and the quantisation by it.
#include "quantize_rows/cuda.h"

#include "common/cuda/finish.cuh"
#include "common/cuda/launch.cuh"
#include "quantize_rows/rows.cuh"

namespace trine {
namespace {

constexpr int kMostRowThreads = 1024;  // a block's most

template <class T, bool kWide, int kRowThreads, int kBlockThreads>
__global__ void __launch_bounds__(kBlockThreads) quantize_rows_kernel(RowsToQuantize problem) {
  const RowShare<T, kWide, kRowThreads, kBlockThreads, kMostRowThreads> share{problem};
  Chunk<T> held[kHeldChunks] = {};
  share.for_held([&](int i, int64_t c) { held[i] = share.load(c); });
  share.quantize(held, [&](int64_t c) { return share.load(c); });
}

template <class T, bool kWide>
void quantize_rows(const RowsToQuantize& problem, cudaStream_t stream) {
  with_row_threads<T, kMostRowThreads>(
      problem, [&]<int kRowThreads, int kBlockThreads>(int64_t blocks) {
        launch("quantize_rows", quantize_rows_kernel<T, kWide, kRowThreads, kBlockThreads>,
               {blocks, kBlockThreads}, stream, problem);
      });
}

// With one scale and zero point for the whole tensor. A block works on a row: first on whether all
// of it is finite, then on the values, four by four.
constexpr int kStaticThreads = 256;

__global__ void __launch_bounds__(kStaticThreads)
    quantize_rows_static_kernel(RowsToQuantize problem, StaticScaleOnDevice fixed) {
  const int64_t m = blockIdx.x;
  const char* x = problem.x + m * problem.row_bytes;
  bool finite = true;
  for (int64_t i = threadIdx.x; i < problem.k; i += kStaticThreads)
    finite = finite &&
             (__float_as_uint(read_float(x, problem.type, i)) & kMagnitudeBits) < kInfinityBits;
  finite = __syncthreads_and(finite);

  const float scale = *fixed.scale;
  const int32_t zero_point = fixed.zero_point == nullptr ? 0 : *fixed.zero_point;
  for (int64_t i = 4 * threadIdx.x; i < problem.q_width; i += 4 * kStaticThreads) {
    uint32_t four = 0;
    for (int64_t j = 0; j < 4 && i + j < problem.k && finite; ++j) {
      const float value = read_float(x, problem.type, i + j);
      four |= (quantize_static_to_low_byte(value, scale, zero_point) & 0xffu) << 8 * j;
    }
    store_global<4>(problem.q + m * problem.q_width + i, &four);
  }
  if (threadIdx.x == 0) problem.scale[m] = finite ? scale : __uint_as_float(kMagnitudeBits);
}

}  // namespace

void quantize_rows_cuda(const void* x, FloatType type, int64_t m, int64_t k, int64_t row_bytes,
                        const QuantizedOnDevice& to, cudaStream_t stream) {
  if (m == 0) return;
  const RowsToQuantize problem = {
      static_cast<const char*>(x), type, m, k, row_bytes, to.q, to.width, to.scale, to.sum};
  with_type_of_x(problem, [&]<class T>(T) {
    if (chunks_are_aligned<T>(problem))
      quantize_rows<T, true>(problem, stream);
    else
      quantize_rows<T, false>(problem, stream);
  });
}

void quantize_rows_static_cuda(const void* x, FloatType type, int64_t m, int64_t k,
                               int64_t row_bytes, const StaticScaleOnDevice& fixed,
                               const QuantizedOnDevice& to, cudaStream_t stream) {
  if (m == 0) return;
  const RowsToQuantize problem = {
      static_cast<const char*>(x), type, m, k, row_bytes, to.q, to.width, to.scale, to.sum};
  launch("quantize_rows", quantize_rows_static_kernel, {m, kStaticThreads}, stream, problem, fixed);
}

}  // namespace trine
