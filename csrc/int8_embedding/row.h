// A row on vectors of floats; `Simd` (in avx2.cpp, avx512.cpp, neon.cpp) wraps the instructions,
// and store_floats comes from common/x86/float_*.h or common/arm/float_neon.h.
#pragma once

#include "int8_embedding/int8_embedding.h"

namespace trine {
namespace {

template <class Simd, class T>
void embed_row(const int8_t* codes, float scale, int64_t dim, T* y) {
  const auto factor = Simd::all(scale);
  for (int64_t i = 0; i < dim; i += Simd::kLanes)
    store_floats(Simd::multiply(Simd::load_codes(codes + i), factor), y + i, dim - i);
}

template <class Simd>
void embed_row(const int8_t* codes, float scale, int64_t dim, FloatType type, void* y) {
  switch (type) {
    case FloatType::float32:
      return embed_row<Simd>(codes, scale, dim, static_cast<float*>(y));
    case FloatType::bfloat16:
      return embed_row<Simd>(codes, scale, dim, static_cast<bfloat16*>(y));
    case FloatType::float16:
      return embed_row<Simd>(codes, scale, dim, static_cast<float16*>(y));
  }
}

}  // namespace
}  // namespace trine
