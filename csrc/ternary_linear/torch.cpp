#include "ternary_linear/torch.h"
#include "common/dispatch.h"

namespace trine {
namespace {

constexpr const char* kOp = "ternary_linear";

constexpr TernaryLinearKernel kKernels[] = {
#ifdef TRINE_X86
    {Isa::avx512vnni, true, ternary_linear_avx512vnni},
    {Isa::avx2vnni, true, ternary_linear_avx2vnni},
    {Isa::avx2vnni_evex, true, ternary_linear_avx2vnni_evex},
    {Isa::avx2, true, ternary_linear_avx2},
#elif defined(TRINE_ARM64)
    {Isa::i8mm, false, ternary_linear_i8mm},
    {Isa::dotprod, false, ternary_linear_dotprod},
#endif
    {Isa::scalar, false, ternary_linear_scalar},
};
[[maybe_unused]] const bool announced = announce(kOp, kKernels);

void transpose_words(QuantizedInput& input, int64_t m) {
  const int64_t stride = input.rows().stride;
  // A thread is worth waking for some 32k bytes, as for quantising them.
  const int64_t grain = std::max<int64_t>(1, 32768 / stride);
  torch::stable::parallel_for(0, m, grain, [&](int64_t begin, int64_t end) {
    for (int8_t* block = input.row(begin); block < input.row(end); block += 64) {
      uint32_t dwords[4][4];
      std::memcpy(dwords, block, 64);
      for (int w = 0; w < 4; ++w)
        for (int i = 0; i < w; ++i) std::swap(dwords[w][i], dwords[i][w]);
      std::memcpy(block, dwords, 64);
    }
  });
}

Tensor ternary_linear_cpu(const Tensor& x, const Tensor& packed_weight, const Tensor& weight_scale,
                          const std::optional<Tensor>& bias) {
  const Matrix rows = as_matrix(x, kOp, "x", kTernaryMaxK);
  const auto [n, words, group_size] = check_ternary_weight(kOp, rows, packed_weight, weight_scale);

  const Tensor weight = torch::stable::contiguous(packed_weight);
  const Tensor scale = torch::stable::contiguous(weight_scale);
  const auto bias_values = read_bias(bias, n, kOp);
  Tensor y = torch::stable::new_empty(x, linear_shape(x, n));
  if (rows.m == 0 || n == 0) return y;

  const TernaryLinearKernel& kernel = select(kKernels);
  QuantizedInput input(rows, kTernaryChunk);
  if (kernel.transposed_input) transpose_words(input, rows.m);
  const bool per_tensor = group_size == 0 && scale.numel() == 1;
  const TernaryWeight packed{static_cast<const uint8_t*>(weight.const_data_ptr()),
                             words * int64_t(sizeof(int32_t)),
                             rows.k,
                             static_cast<const float*>(scale.const_data_ptr()),
                             per_tensor,
                             group_size};
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
      "ternary_linear(Tensor x, Tensor packed_weight, Tensor weight_scale, Tensor? bias=None) -> "
      "Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(trine, CPU, m) {
  m.impl("ternary_linear", TORCH_BOX(&trine::ternary_linear_cpu));
}
