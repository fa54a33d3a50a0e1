// Transposing blocks of floats (NEON).
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace trine {
namespace {

// to[j][i] = from[i][j], 8 x 8, as four blocks of 4 x 4.
[[maybe_unused]] inline void transpose8x8(const float* from, int64_t from_stride, float* to,
                                          int64_t to_stride) {
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 8; j += 4) {
      const float* block = from + i * from_stride + j;
      const float32x4_t a = vld1q_f32(block), b = vld1q_f32(block + from_stride),
                        c = vld1q_f32(block + 2 * from_stride),
                        d = vld1q_f32(block + 3 * from_stride);
      const float32x4_t ac = vzip1q_f32(a, c), ac_high = vzip2q_f32(a, c);
      const float32x4_t bd = vzip1q_f32(b, d), bd_high = vzip2q_f32(b, d);
      float* transposed = to + j * to_stride + i;
      vst1q_f32(transposed, vzip1q_f32(ac, bd));
      vst1q_f32(transposed + to_stride, vzip2q_f32(ac, bd));
      vst1q_f32(transposed + 2 * to_stride, vzip1q_f32(ac_high, bd_high));
      vst1q_f32(transposed + 3 * to_stride, vzip2q_f32(ac_high, bd_high));
    }
}

}  // namespace
}  // namespace trine
