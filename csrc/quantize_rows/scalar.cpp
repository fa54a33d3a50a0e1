#include <cmath>
#include <limits>

#include "quantize_rows/quantize_rows.h"

namespace trine {
namespace {

void zero_row(int64_t k, int8_t* q, int32_t* sum) {
  for (int64_t i = 0; i < k; ++i) q[i] = 0;
  *sum = 0;
}

template <class T>
void quantize_row(const T* x, int64_t k, int8_t* q, float* scale, int32_t* sum) {
  float absmax = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < k; ++i) {
    const float magnitude = std::fabs(widen(x[i]));
    finite &= magnitude <= std::numeric_limits<float>::max();  // false for NaN too
    absmax = magnitude > absmax ? magnitude : absmax;
  }
  if (!finite || absmax < kSmallestAbsmax) {
    *scale = finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    return zero_row(k, q, sum);
  }
  const float to_q = 127.0f / absmax;
  int32_t total = 0;
  for (int64_t i = 0; i < k; ++i) {
    const float rounded = std::nearbyintf(widen(x[i]) * to_q);
    q[i] = static_cast<int8_t>(std::fmin(std::fmax(rounded, -127.0f), 127.0f));
    total += q[i];
  }
  *scale = absmax / 127.0f;
  *sum = total;
}

template <class T>
void quantize_row_static(const T* x, int64_t k, float input_scale, int32_t input_zero_point,
                         int8_t* q, float* scale, int32_t* sum) {
  int32_t total = 0;
  for (int64_t i = 0; i < k; ++i) {
    const float value = widen(x[i]);
    if (!std::isfinite(value)) {
      *scale = std::numeric_limits<float>::quiet_NaN();
      return zero_row(k, q, sum);
    }
    // Clamped before the zero point is added, in floats: both are exact, and int32 cannot overflow.
    const float zero_point = static_cast<float>(input_zero_point);
    const float rounded = std::nearbyintf(value / input_scale);
    const float low = -128.0f - zero_point, high = 127.0f - zero_point;
    q[i] = static_cast<int8_t>(std::fmin(std::fmax(rounded, low), high) + zero_point);
    total += q[i];
  }
  *scale = input_scale;
  *sum = total;
}

}  // namespace

void quantize_row_scalar(const void* x, FloatType type, int64_t k, int8_t* q, float* scale,
                         int32_t* sum) {
  switch (type) {
    case FloatType::float32:
      return quantize_row(static_cast<const float*>(x), k, q, scale, sum);
    case FloatType::bfloat16:
      return quantize_row(static_cast<const bfloat16*>(x), k, q, scale, sum);
    case FloatType::float16:
      return quantize_row(static_cast<const float16*>(x), k, q, scale, sum);
  }
}

void quantize_row_static_scalar(const void* x, FloatType type, int64_t k, float input_scale,
                                int32_t input_zero_point, int8_t* q, float* scale, int32_t* sum) {
  const auto run = [&](const auto* rows) {
    quantize_row_static(rows, k, input_scale, input_zero_point, q, scale, sum);
  };
  switch (type) {
    case FloatType::float32:
      return run(static_cast<const float*>(x));
    case FloatType::bfloat16:
      return run(static_cast<const bfloat16*>(x));
    case FloatType::float16:
      return run(static_cast<const float16*>(x));
  }
}

}  // namespace trine
