// The norms on vectors of floats; `Simd` (in avx2.cpp, avx512.cpp and neon.cpp) wraps the
// instructions, and load_floats and store_floats come from common/x86/float_*.h and common/arm.
//
// What bounds it: in the sums, the two shuffles for each vector that bring neighbours together; for
// 16-bit values their conversion. With the quantiser RMSNorm of a row of floats in the L1 takes 12
// cycles for 16 values (Zen 4), half of them the quantiser's; where x, its norm and the weights
// together outgrow the L1 (K = 6912), 24.
#pragma once

#include <cmath>
#include <cstdint>

#include "norm_quantize_rows/norm_quantize_rows.h"
#include "quantize_rows/rows.h"

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

// S / k of the values that load(at, n) gives, zeros in the lanes from n on.
template <class Simd, class Load>
inline float mean_of(int64_t k, const Load& load) {
  if (k == 0) return 0.0f;
  alignas(64) float sums[kSumLanes / Simd::kLanes];
  int64_t count;
  if (k <= kSumLanes) {
    count = sum_runs<Simd>(k, load, sums);
  } else {
    const auto lanes = [&](int64_t at, int64_t n) {
      auto sum = load(at, n);
      for (int64_t i = at + kSumLanes; i < k; i += kSumLanes)
        sum = Simd::add(sum, load(i, k - i < n ? k - i : n));
      return sum;
    };
    count = sum_runs<Simd>(kSumLanes, lanes, sums);
  }
  const auto again = [&](int64_t at, int64_t n) { return load_floats(sums + at, n); };
  while (count > Simd::kLanes) count = sum_runs<Simd>(count, again, sums);
  for (int64_t left = Simd::kLanes; left > 1; left /= 2)
    for (int64_t i = 0; i < left / 2; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
  return sums[0] / static_cast<float>(k);
}

// `v` with zeros in the lanes from `count` on.
template <class Simd, class Vector>
inline Vector first_of(Vector v, int64_t count) {
  if (count == Simd::kLanes) return v;
  float lanes[Simd::kLanes];
  Simd::store(v, lanes);
  return load_floats(lanes, count);
}

template <class Simd, Norm kNorm, class T>
void norm_row(const T* x, int64_t k, const NormOfRow& norm, T* y) {
  const auto load = [x](int64_t at, int64_t count) { return load_floats(x + at, count); };
  float centre = 0.0f;
  if constexpr (kNorm == Norm::layer) centre = mean_of<Simd>(k, load);
  const auto minus_centre = Simd::all(-centre);
  // Not zero behind the row, where x is.
  const auto centred = [&](int64_t at, int64_t count) {
    if constexpr (kNorm == Norm::rms) return load(at, count);
    return Simd::add(load(at, count), minus_centre);
  };
  const float mean = mean_of<Simd>(k, [&](int64_t at, int64_t count) {
    auto value = centred(at, count);
    if constexpr (kNorm == Norm::layer) value = first_of<Simd>(value, count);
    return Simd::multiply(value, value);
  });
  const auto r = Simd::all(1.0f / std::sqrt(mean + norm.eps));
  for_vectors<Simd>(k, [&](int64_t at, int64_t count) {
    auto value = Simd::multiply(centred(at, count), r);
    if (norm.weight != nullptr) value = Simd::multiply(value, load_floats(norm.weight + at, count));
    if (norm.bias != nullptr) value = Simd::add(value, load_floats(norm.bias + at, count));
    store_floats(value, y + at, count);
  });
}

template <class Simd>
void norm_row(const void* x, FloatType type, int64_t k, const NormOfRow& norm, void* y) {
  with_type(x, type, [&]<class T>(const T* row) {
    if (norm.norm == Norm::rms)
      norm_row<Simd, Norm::rms>(row, k, norm, static_cast<T*>(y));
    else
      norm_row<Simd, Norm::layer>(row, k, norm, static_cast<T*>(y));
  });
}

}  // namespace
}  // namespace trine
