#include "rms_norm_quantize_rows/torch.h"

#include <tuple>

#include "common/dispatch.h"

namespace trine {
namespace {

constexpr const char* kOp = "rms_norm_quantize_rows";

constexpr RmsNormKernel kKernels[] = {
#ifdef TRINE_X86
    {Isa::avx512, rms_norm_row_avx512},
    {Isa::avx2, rms_norm_row_avx2},
#elif defined(TRINE_ARM64)
    {Isa::neon, rms_norm_row_neon},
#endif
    {Isa::scalar, rms_norm_row_scalar},
};
[[maybe_unused]] const bool announced = announce(kOp, kKernels);

std::tuple<Tensor, Tensor, Tensor> rms_norm_quantize_rows_cpu(const Tensor& x,
                                                              const std::optional<Tensor>& weight,
                                                              double eps) {
  const Matrix rows = read_rows_to_norm(kOp, x, weight);
  std::optional<Float32Vector> weights;
  if (weight.has_value()) weights.emplace(*weight, kOp, "weight");
  const float* weight_data = weights.has_value() ? weights->data() : nullptr;
  const RowTensors to = new_quantized_rows(x, rows);
  int8_t* const q = to.q_data();
  float* const scale = to.scale_data();
  int32_t* const sum = to.sum_data();
  const RmsNormKernel& norm = select(kKernels);
  const QuantizeRowsKernel& quantizer = quantize_rows_kernel();
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(rows.k, 1));
  torch::stable::parallel_for(0, rows.m, grain, [&](int64_t begin, int64_t end) {
    // A row between the two steps: it stays in the L1 cache.
    const Scratch y(rows.k * kFloatBytes[static_cast<int>(rows.type)]);
    for (int64_t i = begin; i < end; ++i) {
      norm.row(rows.row(i), rows.type, rows.k, weight_data, static_cast<float>(eps),
               y.data<void>());
      quantizer.dynamic_row(y.data<void>(), rows.type, rows.k, q + i * rows.k, scale + i, sum + i);
    }
  });
  return {to.q, to.scale, to.sum};
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_FRAGMENT(trine, m) {
  m.def("rms_norm_quantize_rows(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(trine, CPU, m) {
  m.impl("rms_norm_quantize_rows", TORCH_BOX(&trine::rms_norm_quantize_rows_cpu));
}
