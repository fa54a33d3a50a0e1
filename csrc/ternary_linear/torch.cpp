#include "common/dispatch.h"
#include "common/torch_linear.h"
#include "ternary_linear/ternary_linear.h"

namespace trine {
namespace {

constexpr const char* kOp = "ternary_linear";

constexpr TernaryLinearKernel kKernels[] = {
#ifdef TRINE_X86
    {Isa::avx512vnni, true, ternary_linear_avx512vnni},
    {Isa::avx2, true, ternary_linear_avx2},
#endif
    {Isa::scalar, false, ternary_linear_scalar},
};
[[maybe_unused]] const bool announced = announce(kOp, kKernels);

// The group size that the shape of `weight_scale` means, 0 for one scale per row or per tensor.
int64_t read_group_size(const Tensor& weight_scale, int64_t n, int64_t k) {
  if (weight_scale.dim() == 2 && weight_scale.size(0) == n) {
    const int64_t groups = weight_scale.size(1);
    check(groups > 0 && k > 0 && k % groups == 0 && k / groups % kTernaryChunk == 0, kOp,
          ": weight_scale has ", groups, " groups per row, which must cut K = ", k,
          " into groups of a multiple of ", kTernaryChunk, " values");
    return k / groups;
  }
  const bool per_tensor = weight_scale.dim() <= 1 && weight_scale.numel() == 1;
  const bool per_row = weight_scale.dim() == 1 && weight_scale.size(0) == n;
  check(per_tensor || per_row, kOp, ": weight_scale must hold one value, [", n,
        "] (one per row of packed_weight) or [", n, ", groups]");
  return 0;
}

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
  check_dtype(packed_weight, ScalarType::Int, "int32", kOp, "packed_weight");
  check_dtype(weight_scale, ScalarType::Float, "float32", kOp, "weight_scale");
  check(packed_weight.dim() == 2, kOp, ": packed_weight must be [N, 4 * ceil(K / 64)]");
  const int64_t n = packed_weight.size(0);
  const int64_t words = round_up(rows.k, kTernaryChunk) / kTernaryPerWord;
  check(packed_weight.size(1) == words, kOp, ": x has K = ", rows.k,
        " columns, which needs a packed_weight of ", words, " columns; it has ",
        packed_weight.size(1));
  const int64_t group_size = read_group_size(weight_scale, n, rows.k);

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
