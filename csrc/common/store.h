// The last step of a linear kernel, one output at a time: add the bias, activate,
// round once, write.
#pragma once

#include "common/linear.h"

namespace trine {
namespace {

[[maybe_unused]] inline void store(const LinearOutput& out, int64_t m, int64_t n, float value) {
  if (out.bias != nullptr) value = value + out.bias[n];
  value = activated(out.activation, value);
  const int64_t at = m * out.stride + n;
  switch (out.type) {
    case FloatType::float32:
      return narrow(value, static_cast<float*>(out.y) + at);
    case FloatType::bfloat16:
      return narrow(value, static_cast<bfloat16*>(out.y) + at);
    case FloatType::float16:
      return narrow(value, static_cast<float16*>(out.y) + at);
  }
}

}  // namespace
}  // namespace trine
