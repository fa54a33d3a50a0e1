#include "int8_embedding/torch.h"

#include "common/dispatch.h"

namespace trine {
namespace {

constexpr Int8EmbeddingKernel kKernels[] = {
#ifdef TRINE_X86
    {Isa::avx512, int8_embedding_avx512},
    {Isa::avx2, int8_embedding_avx2},
#elif defined(TRINE_ARM64)
    {Isa::neon, int8_embedding_neon},
#endif
    {Isa::scalar, int8_embedding_scalar},
};
[[maybe_unused]] const bool announced = announce(kInt8Embedding, kKernels);

// Rows that are asked for ahead: enough for the latency of memory beside the work of a row.
constexpr int64_t kRowsAhead = 8;

template <class Index>
void check_range(const Index* indices, int64_t count, int64_t v) {
  for (int64_t i = 0; i < count; ++i)
    if (indices[i] < 0 || indices[i] >= v) [[unlikely]] {
      std::ostringstream text;
      text << kInt8Embedding << ": indices must lie in [0, " << v << "), one is "
           << int64_t{indices[i]};
      throw std::out_of_range(text.str());  // IndexError, as torch's embedding raises
    }
}

template <class Index>
void embed(const Index* indices, int64_t count, const int8_t* codes, const float* scale, int64_t v,
           int64_t dim, FloatType type, char* y) {
  check_range(indices, count, v);
  const Int8EmbeddingFn* const row = select(kKernels).row;
  const int64_t stride = round_up(dim, kInt8Chunk);
  const int64_t y_bytes = dim * kFloatBytes[static_cast<int>(type)];
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(dim, 1));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const auto prefetch = [&](int64_t i) {
      if (i >= end) return;
      __builtin_prefetch(scale + indices[i]);
      for (int64_t at = 0; at < stride; at += 64)
        __builtin_prefetch(codes + indices[i] * stride + at);
    };
    for (int64_t i = begin; i < begin + kRowsAhead; ++i) prefetch(i);
    for (int64_t i = begin; i < end; ++i) {
      prefetch(i + kRowsAhead);
      row(codes + indices[i] * stride, scale[indices[i]], dim, type, y + i * y_bytes);
    }
  });
}

Tensor int8_embedding_cpu(const Tensor& indices, const Tensor& packed_weight,
                          const Tensor& weight_scale, int64_t dim, ScalarType dtype) {
  const bool wide = check_int8_embedding(indices, packed_weight, weight_scale, dim);
  const FloatType type = float_type(dtype, kInt8Embedding, "dtype");
  const Tensor at = as_contiguous(indices), weight = as_contiguous(packed_weight),
               scales = as_contiguous(weight_scale);
  Tensor y = new_embedding(indices, dim, dtype);
  const auto run = [&](const auto* values) {
    embed(values, at.numel(), static_cast<const int8_t*>(weight.const_data_ptr()),
          static_cast<const float*>(scales.const_data_ptr()), weight.size(0), dim, type,
          static_cast<char*>(y.mutable_data_ptr()));
  };
  if (wide)
    run(static_cast<const int64_t*>(at.const_data_ptr()));
  else
    run(static_cast<const int32_t*>(at.const_data_ptr()));
  return y;
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_FRAGMENT(trine, m) {
  m.def(
      "int8_embedding(Tensor indices, Tensor packed_weight, Tensor weight_scale, int "
      "embedding_dim, ScalarType dtype) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(trine, CPU, m) {
  m.impl("int8_embedding", TORCH_BOX(&trine::int8_embedding_cpu));
}
