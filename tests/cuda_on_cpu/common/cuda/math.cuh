// Twin of csrc/common/cuda/math.cuh: results as wrong as the PTX ISA allows, so that what is proved
// here does not rest on a unit that is better than it is said to be.
#pragma once

#include <cmath>

#include "common/cuda/device.cuh"

namespace trine {

// Between -1 and 1, the same for the same x and different for its neighbour.
inline double some_error(float x) {
  const uint32_t mixed = (__float_as_uint(x) ^ 0x5bd1e995u) * 0x9e3779b1u;
  return double(int32_t(mixed ^ mixed >> 15)) * 0x1p-31;
}

inline float flush_subnormal(double x) {
  return std::fabs(x) < 0x1p-126 ? float(std::copysign(0.0, x)) : float(x);
}

// What is allowed beside the rounding to fp32.
inline constexpr double kAllowed = 0x1p-22 - 0x1p-24;

inline float exp2_approximate(float x) {
  return flush_subnormal(std::exp2(double(x)) * (1 + kAllowed * some_error(x)));
}

inline float log2_approximate(float x) {
  const double exact = std::log2(double(flush_subnormal(x)));
  const double allowed = x > 0.5f && x < 2.0f ? kAllowed : kAllowed * std::fabs(exact);
  return float(std::isfinite(exact) ? exact + allowed * some_error(x) : exact);
}

inline float reciprocal_approximate(float x) {
  return flush_subnormal(1 / double(flush_subnormal(x)) * (1 + 0x1p-24 * some_error(x)));
}

}  // namespace trine
