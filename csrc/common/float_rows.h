// Activations as they come, for the ops that do not quantise them.
#pragma once

#include <cstdint>

#include "common/float_types.h"

namespace trine {

struct FloatRows {
  const char* data;
  int64_t row_bytes;
  int64_t m, k;
  FloatType type;
};

namespace {  // kernel files include this: see float_types.h

// Calls run(pointer) with `data` as a pointer to its type.
template <class Run>
void with_type(const void* data, FloatType type, const Run& run) {
  switch (type) {
    case FloatType::float32:
      return run(static_cast<const float*>(data));
    case FloatType::bfloat16:
      return run(static_cast<const bfloat16*>(data));
    case FloatType::float16:
      return run(static_cast<const float16*>(data));
  }
}

}  // namespace
}  // namespace trine
