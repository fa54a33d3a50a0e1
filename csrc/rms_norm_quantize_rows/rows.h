// RMSNorm on vectors of floats; `Simd` (in avx2.cpp, avx512.cpp and neon.cpp) wraps the
// instructions, and load_floats and store_floats come from common/x86/float_*.h and common/arm.
//
// What bounds it: in the sum, the two shuffles for each vector that bring neighbours together; for
// 16-bit values their conversion. With the quantiser a row of floats in the L1 takes 12 cycles for
// 16 values (Zen 4), half of them the quantiser's; where x, its norm and the weights together
// outgrow the L1 (K = 6912), 24.
#pragma once

#include <cmath>
#include <cstdint>

#include "quantize_rows/rows.h"
#include "rms_norm_quantize_rows/rms_norm_quantize_rows.h"

namespace trine {
namespace {

// sums[i] = the sum of the kLanes values from i * kLanes on, of `count` values; load(at, n) gives n
// of them, from `at` on. Behind the last sum there are zeros up to a whole vector. `sums` may be
// where the values are. Returns the number of sums.
template <class Simd, class Load>
inline int64_t sum_runs(int64_t count, const Load& load, float* sums) {
  constexpr int64_t kLanes = Simd::kLanes, kBlock = kLanes * kLanes;
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock)
    Simd::store(Simd::sum_each([&](int64_t j) { return load(i + j * kLanes, kLanes); }),
                sums + i / kLanes);
  if (i < count)
    Simd::store(Simd::sum_each([&](int64_t j) {
                  const int64_t at = i + j * kLanes, left = count - at;
                  return left <= 0 ? Simd::all(0.0f) : load(at, left < kLanes ? left : kLanes);
                }),
                sums + i / kLanes);
  return (count + kLanes - 1) / kLanes;
}

template <class Simd, class T>
inline float sum_of_squares(const T* x, int64_t k) {
  const auto square = [x](int64_t at, int64_t count) {
    const auto value = load_floats(x + at, count);
    return Simd::multiply(value, value);
  };
  alignas(64) float sums[kSumLanes / Simd::kLanes];
  int64_t count;
  if (k <= kSumLanes) {
    count = sum_runs<Simd>(k, square, sums);
  } else {
    const auto lanes = [&](int64_t at, int64_t n) {
      auto sum = square(at, n);
      for (int64_t i = at + kSumLanes; i < k; i += kSumLanes)
        sum = Simd::add(sum, square(i, k - i < n ? k - i : n));
      return sum;
    };
    count = sum_runs<Simd>(kSumLanes, lanes, sums);
  }
  const auto again = [&](int64_t at, int64_t n) { return load_floats(sums + at, n); };
  while (count > Simd::kLanes) count = sum_runs<Simd>(count, again, sums);
  for (int64_t left = Simd::kLanes; left > 1; left /= 2)
    for (int64_t i = 0; i < left / 2; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
  return sums[0];
}

template <class Simd, class T>
void rms_norm_row(const T* x, int64_t k, const float* weight, float eps, T* y) {
  const float mean = k == 0 ? 0.0f : sum_of_squares<Simd>(x, k) / static_cast<float>(k);
  const auto r = Simd::all(1.0f / std::sqrt(mean + eps));
  for_vectors<Simd>(k, [&](int64_t at, int64_t count) {
    auto value = Simd::multiply(load_floats(x + at, count), r);
    if (weight != nullptr) value = Simd::multiply(value, load_floats(weight + at, count));
    store_floats(value, y + at, count);
  });
}

template <class Simd>
void rms_norm_row(const void* x, FloatType type, int64_t k, const float* weight, float eps,
                  void* y) {
  with_type(x, type, [&]<class T>(const T* row) {
    rms_norm_row<Simd>(row, k, weight, eps, static_cast<T*>(y));
  });
}

}  // namespace
}  // namespace trine
