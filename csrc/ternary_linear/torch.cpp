#include "ternary_linear/torch.h"
#include "common/dispatch.h"

namespace trine {
namespace {

constexpr const char* kOp = "ternary_linear";

constexpr TernaryLinearKernel kKernels[] = {
#ifdef TRINE_X86
    {Isa::avx512vnni, ternary_linear_avx512vnni},
    {Isa::avx2vnni, ternary_linear_avx2vnni},
    {Isa::avx2vnni_evex, ternary_linear_avx2vnni_evex},
    {Isa::avx2, ternary_linear_avx2},
#elif defined(TRINE_ARM64)
    {Isa::i8mm, ternary_linear_i8mm},
    {Isa::dotprod, ternary_linear_dotprod},
#endif
    {Isa::scalar, ternary_linear_scalar},
};
[[maybe_unused]] const bool announced = announce(kOp, kKernels);

// `quantize` gives the rows of `shape`; it is called once everything is checked.
template <class Quantize>
Tensor multiply(const Tensor& like, const LinearShape& shape, const Tensor& packed_weight,
                const Tensor& weight_scale, const std::optional<Tensor>& bias, int64_t activation,
                const Quantize& quantize) {
  const auto [n, words, group_size] =
      check_ternary_weight(kOp, shape.k, packed_weight, weight_scale);

  const Activation kind = read_activation(activation, kOp);
  const Tensor weight = as_contiguous(packed_weight);
  const Tensor scale = as_contiguous(weight_scale);
  const auto bias_values = read_bias(bias, n, kOp);
  Tensor y = shape.new_output(like, n);
  if (shape.m == 0 || n == 0) return y;

  const TernaryLinearKernel& kernel = select(kKernels);
  const QuantizedInput input = quantize();
  const bool per_tensor = group_size == 0 && scale.numel() == 1;
  const TernaryWeight packed{static_cast<const uint8_t*>(weight.const_data_ptr()),
                             words * int64_t(sizeof(int32_t)),
                             shape.k,
                             static_cast<const float*>(scale.const_data_ptr()),
                             per_tensor,
                             group_size};
  const LinearOutput out{y.mutable_data_ptr(), n, shape.type,
                         bias_values.has_value() ? bias_values->data() : nullptr, kind};
  parallel_tiles(shape.m, n, shape.k,
                 [&](const Tile& tile) { kernel.run(input.rows(), packed, out, tile); });
  return y;
}

Tensor ternary_linear_cpu(const Tensor& x, const Tensor& packed_weight, const Tensor& weight_scale,
                          const std::optional<Tensor>& bias, int64_t activation) {
  const Matrix rows = as_matrix(x, kOp, "x", kTernaryMaxK);
  return multiply(x, linear_shape(x, rows), packed_weight, weight_scale, bias, activation,
                  [&] { return QuantizedInput(rows, kTernaryChunk); });
}

Tensor ternary_linear_rows_cpu(const Tensor& q, const Tensor& scale, const Tensor& sum,
                               const Tensor& packed_weight, const Tensor& weight_scale,
                               const std::optional<Tensor>& bias, ScalarType dtype,
                               int64_t activation) {
  const RowTensors rows = read_quantized_rows(q, scale, sum, kOp, kTernaryMaxK);
  return multiply(q, linear_shape(rows, dtype, kOp), packed_weight, weight_scale, bias, activation,
                  [&] { return QuantizedInput(rows, kTernaryChunk); });
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_FRAGMENT(trine, m) {
  m.def(
      "ternary_linear(Tensor x, Tensor packed_weight, Tensor weight_scale, Tensor? bias=None, "
      "int activation=0) -> Tensor");
  m.def(
      "ternary_linear_rows(Tensor q, Tensor scale, Tensor sum, Tensor packed_weight, Tensor "
      "weight_scale, Tensor? bias, ScalarType dtype, int activation=0) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(trine, CPU, m) {
  m.impl("ternary_linear", TORCH_BOX(&trine::ternary_linear_cpu));
  m.impl("ternary_linear_rows", TORCH_BOX(&trine::ternary_linear_rows_cpu));
}
