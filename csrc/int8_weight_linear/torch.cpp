#include "int8_weight_linear/torch.h"
#include "common/dispatch.h"

namespace trine {
namespace {

constexpr const char* kOp = "int8_weight_linear";

constexpr Int8WeightLinearKernel kKernels[] = {
#ifdef TRINE_X86
    {Isa::avx512, FloatType::float32, int8_weight_widen_avx512, int8_weight_linear_avx512},
    {Isa::avx2, FloatType::float32, int8_weight_widen_avx2, int8_weight_linear_avx2},
#elif defined(TRINE_ARM64)
    {Isa::neon, FloatType::float32, int8_weight_widen_neon, int8_weight_linear_neon},
#endif
    {Isa::scalar, FloatType::float32, int8_weight_widen_scalar, int8_weight_linear_scalar},
};
#ifdef TRINE_X86
// For many rows of bf16.
constexpr Int8WeightLinearKernel kPairedKernels[] = {
    {Isa::avx512bf16, FloatType::bfloat16, int8_weight_widen_avx512bf16,
     int8_weight_linear_avx512bf16},
    kKernels[0],
    kKernels[1],
    kKernels[2],
};
[[maybe_unused]] const bool paired_announced =
    announce("int8_weight_linear (many rows of bf16)", kPairedKernels);
#endif
[[maybe_unused]] const bool announced = announce(kOp, kKernels);

const Int8WeightLinearKernel& kernel_for([[maybe_unused]] const Matrix& x) {
#ifdef TRINE_X86
  if (x.type == FloatType::bfloat16 && x.m >= kInt8WeightPairedRows) return select(kPairedKernels);
#endif
  return select(kKernels);
}

// The rows of x in scratch memory, as `kernel` wants them.
class WideInput {
 public:
  WideInput(const Matrix& x, const Int8WeightLinearKernel& kernel)
      : row_bytes_(row_bytes(x.k, kFloatBytes[static_cast<int>(kernel.rows)])),
        storage_(x.m * row_bytes_),
        rows_{storage_.data<void>(), row_bytes_ / kFloatBytes[static_cast<int>(kernel.rows)], x.m} {
    const FloatRows rows{x.data, x.row_bytes, x.m, x.k, x.type};
    const int64_t grain = std::max<int64_t>(1, 131072 / row_bytes_);
    torch::stable::parallel_for(0, x.m, grain, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m)
        kernel.widen(rows, m, rows_.stride, storage_.data<char>() + m * row_bytes_);
    });
  }

  const WideRows& rows() const { return rows_; }

 private:
  // Rows a multiple of 1 KiB apart would lie in few sets of an L1.
  static int64_t row_bytes(int64_t k, int64_t value_bytes) {
    const int64_t bytes = std::max<int64_t>(round_up(k * value_bytes, 64), 64);
    return bytes % 1024 == 0 ? bytes + 64 : bytes;
  }

  int64_t row_bytes_;
  Scratch storage_;
  WideRows rows_;
};

Tensor int8_weight_linear_cpu(const Tensor& x, const Tensor& packed_weight,
                              const Tensor& weight_scale, const std::optional<Tensor>& bias) {
  const Matrix rows = as_matrix(x, kOp, "x");
  const auto [n, packed_k, groups] =
      check_int8_weight_only(kOp, rows.k, packed_weight, weight_scale);

  const Tensor weight = as_contiguous(packed_weight), scale = as_contiguous(weight_scale);
  const auto bias_values = read_bias(bias, n, kOp);
  Tensor y = linear_shape(x, rows).new_output(x, n);
  if (rows.m == 0 || n == 0) return y;

  const Int8WeightLinearKernel& kernel = kernel_for(rows);
  const WideInput input(rows, kernel);
  const GroupedInt8Weight packed{static_cast<const int8_t*>(weight.const_data_ptr()), packed_k,
                                 rows.k, static_cast<const float*>(scale.const_data_ptr()), groups};
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
      "int8_weight_linear(Tensor x, Tensor packed_weight, Tensor weight_scale, Tensor? bias=None) "
      "-> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(trine, CPU, m) {
  m.impl("int8_weight_linear", TORCH_BOX(&trine::int8_weight_linear_cpu));
}
