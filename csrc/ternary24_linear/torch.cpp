#include "ternary24_linear/torch.h"
#include "common/dispatch.h"

namespace trine {
namespace {

constexpr const char* kOp = "ternary24_linear";

constexpr Ternary24LinearKernel kKernels[] = {
#ifdef TRINE_X86
    {Isa::avx512vbmi, ternary24_linear_avx512vbmi},
    {Isa::avx512vnni, ternary24_linear_avx512vnni},
    {Isa::avx2vnni, ternary24_linear_avx2vnni},
    {Isa::avx2vnni_evex, ternary24_linear_avx2vnni_evex},
    {Isa::avx2, ternary24_linear_avx2},
#elif defined(TRINE_ARM64)
    {Isa::i8mm, ternary24_linear_i8mm},
    {Isa::dotprod, ternary24_linear_dotprod},
#endif
    {Isa::scalar, ternary24_linear_scalar},
};
[[maybe_unused]] const bool announced = announce(kOp, kKernels);

Tensor ternary24_linear_cpu(const Tensor& x, const Tensor& packed_weight,
                            const Tensor& weight_scale, const std::optional<Tensor>& bias) {
  const Matrix rows = as_matrix(x, kOp, "x", kTernary24MaxK);
  const int64_t n = check_ternary24_weight(kOp, rows.k, packed_weight, weight_scale);
  const Tensor weight = as_contiguous(packed_weight);
  const Tensor scale = as_contiguous(weight_scale);
  const auto bias_values = read_bias(bias, n, kOp);
  Tensor y = linear_shape(x, rows).new_output(x, n);
  if (rows.m == 0 || n == 0) return y;

  const Ternary24LinearKernel& kernel = select(kKernels);
  const QuantizedInput input(rows, 64);
  const Ternary24Weight packed{static_cast<const uint8_t*>(weight.const_data_ptr()), weight.size(1),
                               rows.k, static_cast<const float*>(scale.const_data_ptr()),
                               scale.numel() == 1};
  const LinearOutput out{y.mutable_data_ptr(), n, rows.type,
                         bias_values.has_value() ? bias_values->data() : nullptr};
  parallel_tiles(rows.m, n, rows.k,
                 [&](const Tile& tile) { kernel.run(input.rows(), packed, out, tile); });
  return y;
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_FRAGMENT(trine, m) {
  m.def(
      "ternary24_linear(Tensor x, Tensor packed_weight, Tensor weight_scale, Tensor? bias=None) -> "
      "Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(trine, CPU, m) {
  m.impl("ternary24_linear", TORCH_BOX(&trine::ternary24_linear_cpu));
}
