#include "int8_linear/torch.h"
#include "common/dispatch.h"

namespace trine {
namespace {

constexpr const char* kOp = "int8_linear";

constexpr Int8LinearKernel kKernels[] = {
#ifdef TRINE_X86
    {Isa::avx512vnni, int8_linear_avx512vnni},
    {Isa::avx2vnni, int8_linear_avx2vnni},
    {Isa::avx2vnni_evex, int8_linear_avx2vnni_evex},
    {Isa::avx2, int8_linear_avx2},
#elif defined(TRINE_ARM64)
    {Isa::i8mm, int8_linear_i8mm},
    {Isa::dotprod, int8_linear_dotprod},
#endif
    {Isa::scalar, int8_linear_scalar},
};
[[maybe_unused]] const bool announced = announce(kOp, kKernels);

// `quantize` gives the rows of `shape`; it is called once everything is checked.
template <class Quantize>
Tensor multiply(const Tensor& like, const LinearShape& shape, const Tensor& packed_weight,
                const Tensor& weight_scale, const std::optional<Tensor>& bias, int64_t activation,
                int32_t zero_point, const Quantize& quantize) {
  const int64_t packed_k = check_int8_weight(kOp, shape.k, packed_weight, weight_scale);
  const int64_t n = packed_weight.size(0);

  const Activation kind = read_activation(activation, kOp);
  const Tensor weight = as_contiguous(packed_weight);
  const Float32Vector scale(weight_scale, kOp, "weight_scale");
  const auto bias_values = read_bias(bias, n, kOp);
  Tensor y = shape.new_output(like, n);
  if (shape.m == 0 || n == 0) return y;

  const QuantizedInput input = quantize();
  const Int8Weight packed{static_cast<const int8_t*>(weight.const_data_ptr()), packed_k, shape.k,
                          scale.data()};
  const LinearOutput out{y.mutable_data_ptr(), n, shape.type,
                         bias_values.has_value() ? bias_values->data() : nullptr, kind};
  const Int8LinearKernel& kernel = select(kKernels);
  parallel_tiles(shape.m, n, shape.k, [&](const Tile& tile) {
    kernel.run(input.rows(), zero_point, packed, out, tile);
  });
  return y;
}

Tensor int8_linear_cpu(const Tensor& x, const Tensor& packed_weight, const Tensor& weight_scale,
                       const std::optional<Tensor>& bias, int64_t activation,
                       const std::optional<Tensor>& input_scale,
                       const std::optional<Tensor>& input_zero_point) {
  const auto fixed = read_static_input(kOp, input_scale, input_zero_point);
  const Matrix rows = as_matrix(x, kOp, "x", fixed.has_value() ? kInt8MaxKStatic : kInt8MaxK);
  return multiply(x, linear_shape(x, rows), packed_weight, weight_scale, bias, activation,
                  fixed.has_value() ? fixed->zero_point : 0,
                  [&] { return QuantizedInput(rows, 64, fixed); });
}

Tensor int8_linear_rows_cpu(const Tensor& q, const Tensor& scale, const Tensor& sum,
                            const Tensor& packed_weight, const Tensor& weight_scale,
                            const std::optional<Tensor>& bias, ScalarType dtype,
                            int64_t activation) {
  const RowTensors rows = read_quantized_rows(q, scale, sum, kOp, kInt8MaxK);
  return multiply(q, linear_shape(rows, dtype, kOp), packed_weight, weight_scale, bias, activation,
                  0, [&] { return QuantizedInput(rows, 64); });
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_FRAGMENT(trine, m) {
  m.def(
      "int8_linear(Tensor x, Tensor packed_weight, Tensor weight_scale, Tensor? bias=None, int "
      "activation=0, *, Tensor? input_scale=None, Tensor? input_zero_point=None) -> Tensor");
  m.def(
      "int8_linear_rows(Tensor q, Tensor scale, Tensor sum, Tensor packed_weight, Tensor "
      "weight_scale, Tensor? bias, ScalarType dtype, int activation=0) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(trine, CPU, m) {
  m.impl("int8_linear", TORCH_BOX(&trine::int8_linear_cpu));
  m.impl("int8_linear_rows", TORCH_BOX(&trine::int8_linear_rows_cpu));
}
