#include <cmath>

#include "rms_norm_quantize_rows/rms_norm_quantize_rows.h"

namespace trine {
namespace {

// The sum of `lanes` lanes (a power of two) from `first` on.
template <class T>
float sum_of_squares(const T* x, int64_t k, int64_t first, int64_t lanes) {
  if (first >= k) return 0.0f;
  if (lanes > 1)
    return sum_of_squares(x, k, first, lanes / 2) +
           sum_of_squares(x, k, first + lanes / 2, lanes / 2);
  float sum = 0.0f;
  for (int64_t i = first; i < k; i += kSumLanes) sum += widen(x[i]) * widen(x[i]);
  return sum;
}

template <class T>
void rms_norm_row(const void* row, int64_t k, const float* weight, float eps, void* to) {
  const T* x = static_cast<const T*>(row);
  T* y = static_cast<T*>(to);
  const float mean = sum_of_squares(x, k, 0, kSumLanes) / static_cast<float>(k);
  const float r = 1.0f / std::sqrt(mean + eps);
  for (int64_t i = 0; i < k; ++i) {
    const float normed = widen(x[i]) * r;
    narrow(weight == nullptr ? normed : normed * weight[i], y + i);
  }
}

}  // namespace

void rms_norm_row_scalar(const void* x, FloatType type, int64_t k, const float* weight, float eps,
                         void* y) {
  switch (type) {
    case FloatType::float32:
      return rms_norm_row<float>(x, k, weight, eps, y);
    case FloatType::bfloat16:
      return rms_norm_row<bfloat16>(x, k, weight, eps, y);
    case FloatType::float16:
      return rms_norm_row<float16>(x, k, weight, eps, y);
  }
}

}  // namespace trine
