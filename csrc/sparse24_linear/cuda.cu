// sparse24_linear for every GPU from sm_80 on.
#include "sparse24_linear/cuda.h"

#include "sparse24_linear/few_rows.cuh"
#include "sparse24_linear/tiles.cuh"

namespace trine {
namespace {

template <class Values>
void run(const DeviceSparse24& sparse, cudaStream_t stream) {
  if (sparse.linear.m <= kSparse24FewRows)
    sparse24_few_rows<Values>(sparse, stream);
  else if (compute_capability() == 90 && sparse24_suits_sm90a(sparse))
    sparse24_linear_cuda_sm90a(sparse, stream);
  else
    sparse24_tiles<Values>(sparse, stream);
}

}  // namespace

void sparse24_linear_cuda(const DeviceSparse24& sparse, cudaStream_t stream) {
  if (sparse.linear.m == 0 || sparse.linear.n == 0) return;
  switch (sparse.values) {
    case Sparse24Values::int8:
      return run<Int8Values>(sparse, stream);
    case Sparse24Values::float16:
      return run<HalfValues>(sparse, stream);
    case Sparse24Values::bfloat16:
      return run<BfloatValues>(sparse, stream);
  }
}

}  // namespace trine
