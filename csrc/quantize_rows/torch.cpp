#include <tuple>

#include "common/dispatch.h"
#include "common/torch_linear.h"

namespace trine {
namespace {

constexpr QuantizeRowsKernel kKernels[] = {
#ifdef TRINE_X86
    {Isa::avx512, quantize_row_avx512, quantize_row_static_avx512},
    {Isa::avx2, quantize_row_avx2, quantize_row_static_avx2},
#elif defined(TRINE_ARM64)
    {Isa::neon, quantize_row_neon, quantize_row_static_neon},
#endif
    {Isa::scalar, quantize_row_scalar, quantize_row_static_scalar},
};
[[maybe_unused]] const bool announced = announce("quantize_rows", kKernels);

std::tuple<Tensor, Tensor, Tensor> quantize_rows_cpu(const Tensor& x) {
  const Matrix rows = as_matrix(x, "quantize_rows", "x", kQuantizeRowsMaxK);
  const RowTensors to = new_quantized_rows(x, rows);
  int8_t* const q = to.q_data();
  float* const scale = to.scale_data();
  int32_t* const sum = to.sum_data();
  const QuantizeRowsKernel& kernel = quantize_rows_kernel();
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(rows.k, 1));
  torch::stable::parallel_for(0, rows.m, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernel.dynamic_row(rows.row(i), rows.type, rows.k, q + i * rows.k, scale + i, sum + i);
  });
  return {to.q, to.scale, to.sum};
}

}  // namespace

const QuantizeRowsKernel& quantize_rows_kernel() { return select(kKernels); }

}  // namespace trine

STABLE_TORCH_LIBRARY_FRAGMENT(trine, m) {
  m.def("quantize_rows(Tensor x) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(trine, CPU, m) {
  m.impl("quantize_rows", TORCH_BOX(&trine::quantize_rows_cpu));
}
