#include "sparse24_linear/torch.h"

#include "common/dispatch.h"

namespace trine {
namespace {

constexpr const char* kOp = "sparse24_linear";

constexpr Sparse24FloatKernel kFloatKernels[] = {
#ifdef TRINE_X86
    {Isa::avx512, sizeof(float), sparse24_block_avx512, sparse24_widen_avx512,
     sparse24_float_avx512},
    {Isa::avx2, sizeof(float), sparse24_block_avx2, sparse24_widen_avx2, sparse24_float_avx2},
#elif defined(TRINE_ARM64)
    {Isa::neon, sizeof(float), sparse24_block_neon, sparse24_widen_neon, sparse24_float_neon},
#endif
    {Isa::scalar, sizeof(float), sparse24_block_scalar, sparse24_widen_scalar,
     sparse24_float_scalar},
};
#ifdef TRINE_X86
// For bf16 values and many rows of bf16 x.
constexpr Sparse24FloatKernel kPairedKernels[] = {
    {Isa::avx512bf16, 6, sparse24_block_avx512bf16, sparse24_widen_avx512bf16,
     sparse24_float_avx512bf16},
    kFloatKernels[0],
    kFloatKernels[1],
    kFloatKernels[2],
};
[[maybe_unused]] const bool paired_announced =
    announce("sparse24_linear (many rows of bf16)", kPairedKernels);
#endif
constexpr Sparse24Int8Kernel kInt8Kernels[] = {
#ifdef TRINE_X86
    {Isa::avx512vbmi, sparse24_int8_avx512vbmi},
    {Isa::avx512vnni, sparse24_int8_avx512vnni},
    {Isa::avx2vnni, sparse24_int8_avx2vnni},
    {Isa::avx2vnni_evex, sparse24_int8_avx2vnni_evex},
    {Isa::avx2, sparse24_int8_avx2},
#elif defined(TRINE_ARM64)
    {Isa::i8mm, sparse24_int8_i8mm},
    {Isa::dotprod, sparse24_int8_dotprod},
#endif
    {Isa::scalar, sparse24_int8_scalar},
};
[[maybe_unused]] const bool announced = announce("sparse24_linear (float values)", kFloatKernels) &&
                                        announce("sparse24_linear (int8 values)", kInt8Kernels);

const Sparse24FloatKernel& float_kernel([[maybe_unused]] const Matrix& x,
                                        [[maybe_unused]] FloatType values) {
#ifdef TRINE_X86
  if (x.type == FloatType::bfloat16 && values == FloatType::bfloat16 && x.m >= kSparse24PairedRows)
    return select(kPairedKernels);
#endif
  return select(kFloatKernels);
}

// The rows of x in scratch memory, in the layout that `kernel` wants.
class WidenedInput {
 public:
  WidenedInput(const Matrix& x, int64_t columns, const Sparse24FloatKernel& kernel)
      : block_(kernel.block(x.m)),
        storage_(round_up(x.m, block_) * columns * kernel.column_bytes),
        blocks_{storage_.data<float>(), x.m, columns, block_} {
    const FloatRows rows{x.data, x.row_bytes, x.m, x.k, x.type};
    const int64_t block_bytes = block_ * columns * kernel.column_bytes;
    const int64_t grain = std::max<int64_t>(1, 131072 / std::max<int64_t>(block_bytes, 1));
    torch::stable::parallel_for(
        0, round_up(x.m, block_) / block_, grain, [&](int64_t begin, int64_t end) {
          for (int64_t b = begin; b < end; ++b)
            kernel.widen(rows, b, block_, columns,
                         reinterpret_cast<float*>(storage_.data<char>() + b * block_bytes));
        });
  }

  const FloatBlocks& blocks() const { return blocks_; }

 private:
  int64_t block_;
  Scratch storage_;
  FloatBlocks blocks_;
};

void run_float(const Matrix& rows, const Tensor& values, const uint8_t* indices, int64_t columns,
               const LinearOutput& out) {
  const Sparse24FloatWeight weight{values.const_data_ptr(), float_type(values, kOp, "values"),
                                   indices};
  const Sparse24FloatKernel& kernel = float_kernel(rows, weight.type);
  const WidenedInput input(rows, columns, kernel);
  parallel_tiles(rows.m, values.size(0), columns / 2,
                 [&](const Tile& tile) { kernel.run(input.blocks(), weight, out, tile); });
}

void run_int8(const Matrix& rows, const Tensor& values, const uint8_t* indices, int64_t columns,
              const float* scale, const LinearOutput& out) {
  const Sparse24Int8Kernel& kernel = select(kInt8Kernels);
  const QuantizedInput input(rows, 64);
  const Sparse24Int8Weight weight{static_cast<const int8_t*>(values.const_data_ptr()), indices,
                                  columns / kSparse24Columns, scale};
  parallel_tiles(rows.m, values.size(0), columns / 2,
                 [&](const Tile& tile) { kernel.run(input.rows(), weight, out, tile); });
}

Tensor sparse24_linear_cpu(const Tensor& x, const Tensor& values, const Tensor& indices,
                           const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& weight_scale) {
  const Matrix rows = check_sparse24(kOp, x, values, indices, weight_scale);
  const int64_t columns = round_up(rows.k, kSparse24Columns);
  const int64_t n = values.size(0);

  const Tensor whole_values = as_contiguous(values);
  const Tensor whole_indices = as_contiguous(indices);
  const auto* index_data = static_cast<const uint8_t*>(whole_indices.const_data_ptr());
  const auto bias_values = read_bias(bias, n, kOp);
  Tensor y = linear_shape(x, rows).new_output(x, n);
  if (rows.m == 0 || n == 0) return y;

  const LinearOutput out{y.mutable_data_ptr(), n, rows.type,
                         bias_values.has_value() ? bias_values->data() : nullptr};
  if (weight_scale.has_value()) {
    const Float32Vector scale(*weight_scale, kOp, "weight_scale");
    run_int8(rows, whole_values, index_data, columns, scale.data(), out);
  } else {
    run_float(rows, whole_values, index_data, columns, out);
  }
  return y;
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_FRAGMENT(trine, m) {
  m.def(
      "sparse24_linear(Tensor x, Tensor values, Tensor indices, Tensor? bias=None, *, "
      "Tensor? weight_scale=None) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(trine, CPU, m) {
  m.impl("sparse24_linear", TORCH_BOX(&trine::sparse24_linear_cpu));
}
