#include <cmath>

#include "norm_quantize_rows/norm_quantize_rows.h"

namespace trine {
namespace {

// S, less what is missing, of the `lanes` lanes (a power of two) from `first` on.
template <class Value>
float sum_pairwise(const Value& value, int64_t k, int64_t first, int64_t lanes) {
  if (first >= k) return 0.0f;
  if (lanes > 1)
    return sum_pairwise(value, k, first, lanes / 2) +
           sum_pairwise(value, k, first + lanes / 2, lanes / 2);
  float sum = 0.0f;
  for (int64_t i = first; i < k; i += kSumLanes) sum += value(i);
  return sum;
}

template <class T>
void norm_row(const T* x, int64_t k, const NormOfRow& norm, T* y) {
  const auto mean_of = [k](const auto& value) {
    return sum_pairwise(value, k, 0, kSumLanes) / static_cast<float>(k);
  };
  float centre = 0.0f;
  if (norm.norm == Norm::layer) centre = mean_of([x](int64_t i) { return widen(x[i]); });
  const auto centred = [x, centre](int64_t i) { return widen(x[i]) - centre; };
  const float mean = mean_of([&](int64_t i) { return centred(i) * centred(i); });
  const float r = 1.0f / std::sqrt(mean + norm.eps);
  for (int64_t i = 0; i < k; ++i) {
    float value = centred(i) * r;
    if (norm.weight != nullptr) value *= norm.weight[i];
    if (norm.bias != nullptr) value += norm.bias[i];
    narrow(value, y + i);
  }
}

}  // namespace

void norm_row_scalar(const void* x, FloatType type, int64_t k, const NormOfRow& norm, void* y) {
  const auto run = [&]<class T>(T) {
    norm_row(static_cast<const T*>(x), k, norm, static_cast<T*>(y));
  };
  switch (type) {
    case FloatType::float32:
      return run(float{});
    case FloatType::bfloat16:
      return run(bfloat16{});
    case FloatType::float16:
      return run(float16{});
  }
}

}  // namespace trine
