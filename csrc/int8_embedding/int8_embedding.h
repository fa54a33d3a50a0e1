// Rows of an int8 table, dequantised:
//   y[i][j] = float(codes[indices[i]][j]) * scale[indices[i]]
// in fp32, then rounded once to the output dtype. The table is int8_linear's packed weight: rows of
// int8, zero-padded to whole 16-byte chunks, and one fp32 scale each; an output layer that is tied
// to the embedding reads the same memory.
#pragma once

#include <cstdint>

#include "common/float_types.h"
#include "common/isa.h"

namespace trine {

// Writes one row of `dim` values. `codes` can be read up to the next multiple of 16.
using Int8EmbeddingFn = void(const int8_t* codes, float scale, int64_t dim, FloatType type,
                             void* y);

struct Int8EmbeddingKernel {
  Isa needs;
  Int8EmbeddingFn* row;
};

Int8EmbeddingFn int8_embedding_scalar, int8_embedding_avx2, int8_embedding_avx512,
    int8_embedding_neon;

}  // namespace trine
