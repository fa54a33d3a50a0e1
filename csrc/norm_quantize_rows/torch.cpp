#include "norm_quantize_rows/torch.h"

#include <tuple>

#include "common/dispatch.h"

namespace trine {
namespace {

constexpr NormKernel kKernels[] = {
#ifdef TRINE_X86
    {Isa::avx512, norm_row_avx512},
    {Isa::avx2, norm_row_avx2},
#elif defined(TRINE_ARM64)
    {Isa::neon, norm_row_neon},
#endif
    {Isa::scalar, norm_row_scalar},
};
[[maybe_unused]] const bool announced = announce("norm_quantize_rows", kKernels);

std::tuple<Tensor, Tensor, Tensor> norm_quantize_rows(const char* op, Norm norm, const Tensor& x,
                                                      const OptionalTensor& weight,
                                                      const OptionalTensor& bias, double eps) {
  const Matrix rows = read_rows_to_norm(op, x, weight, bias);
  std::optional<Float32Vector> weights, biases;
  if (weight.has_value()) weights.emplace(*weight, op, "weight");
  if (bias.has_value()) biases.emplace(*bias, op, "bias");
  const NormOfRow of_row = {norm, weights.has_value() ? weights->data() : nullptr,
                            biases.has_value() ? biases->data() : nullptr, static_cast<float>(eps)};
  const RowTensors to = new_quantized_rows(x, rows);
  int8_t* const q = to.q_data();
  float* const scale = to.scale_data();
  int32_t* const sum = to.sum_data();
  const NormKernel& kernel = select(kKernels);
  const QuantizeRowsKernel& quantizer = quantize_rows_kernel();
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(rows.k, 1));
  torch::stable::parallel_for(0, rows.m, grain, [&](int64_t begin, int64_t end) {
    // A row between the two steps: it stays in the L1 cache.
    const Scratch y(rows.k * kFloatBytes[static_cast<int>(rows.type)]);
    for (int64_t i = begin; i < end; ++i) {
      kernel.row(rows.row(i), rows.type, rows.k, of_row, y.data<void>());
      quantizer.dynamic_row(y.data<void>(), rows.type, rows.k, q + i * rows.k, scale + i, sum + i);
    }
  });
  return {to.q, to.scale, to.sum};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_quantize_rows_cpu(const Tensor& x,
                                                              const OptionalTensor& weight,
                                                              double eps) {
  return norm_quantize_rows(kRmsNorm, Norm::rms, x, weight, std::nullopt, eps);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_quantize_rows_cpu(const Tensor& x,
                                                                const OptionalTensor& weight,
                                                                const OptionalTensor& bias,
                                                                double eps) {
  return norm_quantize_rows(kLayerNorm, Norm::layer, x, weight, bias, eps);
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_FRAGMENT(trine, m) {
  m.def("rms_norm_quantize_rows(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_quantize_rows(Tensor x, Tensor? weight, Tensor? bias, float eps)"
      " -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(trine, CPU, m) {
  m.impl("rms_norm_quantize_rows", TORCH_BOX(&trine::rms_norm_quantize_rows_cpu));
  m.impl("layer_norm_quantize_rows", TORCH_BOX(&trine::layer_norm_quantize_rows_cpu));
}
