// The two quantisers on vectors of floats; `Simd` (in avx2.cpp and avx512.cpp) wraps the
// instructions, and load_floats comes from common/x86/float_*.h.
//
// Magnitudes are compared as integers: the bits of a float without its sign grow with its size, and
// infinity and NaN are the largest of all, so one maximum finds both absmax and non-finite values.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "quantize_rows/quantize_rows.h"

namespace trine {
namespace {

constexpr uint32_t kLargestFinite = 0x7f7fffffu;

// Calls visit(i, count) for pieces of [0, k): whole vectors, then what is left.
template <class Simd, class Visit>
inline void for_vectors(int64_t k, const Visit& visit) {
  int64_t i = 0;
  for (; i + Simd::kLanes <= k; i += Simd::kLanes) visit(i, Simd::kLanes);
  if (i < k) visit(i, k - i);
}

[[maybe_unused]] void zero_row(int64_t k, int8_t* q, int32_t* sum) {
  std::memset(q, 0, static_cast<std::size_t>(k));
  *sum = 0;
}

template <class Simd, class T>
void quantize_row(const T* x, int64_t k, int8_t* q, float* scale, int32_t* sum) {
  auto largest = Simd::zero();
  for_vectors<Simd>(k, [&](int64_t i, int64_t count) {
    largest = Simd::max(largest, Simd::magnitude(load_floats(x + i, count)));
  });
  const uint32_t magnitude = Simd::highest(largest);
  const float absmax = from_bits(magnitude);
  if (magnitude > kLargestFinite || absmax < kSmallestAbsmax) {
    *scale = magnitude > kLargestFinite ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
    return zero_row(k, q, sum);
  }
  // |x * to_q| exceeds 127 by rounding errors only, far less than the half that would round up to
  // 128: the clamp of the definition never acts.
  const auto to_q = Simd::all(127.0f / absmax);
  auto total = Simd::zero();
  for_vectors<Simd>(k, [&](int64_t i, int64_t count) {
    const auto rounded = Simd::rint(Simd::multiply(load_floats(x + i, count), to_q));
    Simd::store_bytes(rounded, q + i, count);
    total = Simd::add(total, rounded);
  });
  *scale = absmax / 127.0f;
  *sum = Simd::sum(total);
}

template <class Simd, class T>
void quantize_row_static(const T* x, int64_t k, float input_scale, int32_t input_zero_point,
                         int8_t* q, float* scale, int32_t* sum) {
  const auto divisor = Simd::all(input_scale);
  // Clamped before the zero point is added: int32 could not hold every rounded quotient.
  const auto low = Simd::all(static_cast<float>(-128 - input_zero_point));
  const auto high = Simd::all(static_cast<float>(127 - input_zero_point));
  const auto zero_point = Simd::all(input_zero_point);
  auto largest = Simd::zero(), total = Simd::zero();
  for_vectors<Simd>(k, [&](int64_t i, int64_t count) {
    const auto value = load_floats(x + i, count);
    largest = Simd::max(largest, Simd::magnitude(value));
    const auto steps = Simd::rint(Simd::clamp(Simd::divide(value, divisor), low, high));
    const auto result = Simd::add(steps, zero_point);
    Simd::store_bytes(result, q + i, count);
    total = Simd::add(total, Simd::keep(result, count));
  });
  const bool finite = Simd::highest(largest) <= kLargestFinite;
  *scale = finite ? input_scale : std::numeric_limits<float>::quiet_NaN();
  if (!finite) return zero_row(k, q, sum);
  *sum = Simd::sum(total);
}

// Calls run(x) with the pointer typed.
template <class Run>
inline void with_type(const void* x, FloatType type, const Run& run) {
  switch (type) {
    case FloatType::float32:
      return run(static_cast<const float*>(x));
    case FloatType::bfloat16:
      return run(static_cast<const bfloat16*>(x));
    case FloatType::float16:
      return run(static_cast<const float16*>(x));
  }
}

}  // namespace
}  // namespace trine
