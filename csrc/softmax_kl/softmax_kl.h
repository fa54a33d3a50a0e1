// Kullback-Leibler divergence of a student's softmax from a teacher's (Hinton et al. 2015,
// arXiv:1503.02531). Per row of n logits s (student) and t (teacher), with temperature T:
//   a = log_softmax(s / T) = (s - max_s) / T - log_sum_s
//   b = log_softmax(t / T) = (t - max_t) / T - log_sum_t
//   kl = sum_j exp(b_j) * (b_j - a_j),  loss = T^2 * kl
//   d loss / d s_j = T * (exp(a_j) - exp(b_j))
//   d loss / d t_j = T * exp(b_j) * (b_j - a_j - kl)
//
// Limits: exp(b_j) = 0 contributes 0, also where a_j is -inf; a_j = -inf where exp(b_j) > 0 makes
// kl +inf; NaN or +inf in a row, or a row of nothing but -inf, makes the row's loss and gradient
// NaN. A probability below 2^-127 counts as 0.
//
// Maxima and log-sums are kept apart: in one fp32 log-sum-exp of about 1e4 an ulp is 1e-3, and the
// probabilities would be wrong by as much.
//
// What bounds it: memory, where the logits exceed the caches. Measured at 1024 x 32000 fp32 on two
// Zen 5 cores with AVX-512: forward (8 ms, 31 GB/s) takes no longer than torch's amax of both
// tensors. Of backward (36 ms) filling a fresh 131 MB tensor alone takes 70%: page faults. In cache
// two exponentials an element in each direction remain, 0.4 ns an element and core.
#pragma once

#include <cstdint>

#include "common/float_types.h"
#include "common/isa.h"

namespace trine {

// A row of logits in memory.
struct LogitRow {
  const void* data;
  FloatType type;
};

// What forward leaves to backward, as a row of the saved fp32 tensor.
struct SoftmaxKlRow {
  float max_student, max_teacher;
  float log_sum_teacher;
  // log_sum_student - log_sum_teacher, rounded once: the log-sums themselves are known only to 1e-6
  // or so, which would be the error of a - b, and all of it where the student is close.
  float log_ratio;  // NaN marks a row without a loss
  float kl;
};
inline constexpr int64_t kSoftmaxKlColumns = sizeof(SoftmaxKlRow) / sizeof(float);

using SoftmaxKlForward = void(LogitRow student, LogitRow teacher, int64_t n,
                              float inverse_temperature, SoftmaxKlRow* result);

// Writes scale * (d loss / d logits) / T to `gradient`, whose type is that of the logits.
using SoftmaxKlBackward = void(LogitRow student, LogitRow teacher, int64_t n,
                               float inverse_temperature, const SoftmaxKlRow& row, float scale,
                               void* gradient);

struct SoftmaxKlKernel {
  Isa needs;
  SoftmaxKlForward* forward;
  SoftmaxKlBackward* student_gradient;
  SoftmaxKlBackward* teacher_gradient;
};

SoftmaxKlForward softmax_kl_scalar, softmax_kl_avx2, softmax_kl_avx512, softmax_kl_neon;
SoftmaxKlBackward softmax_kl_student_gradient_scalar, softmax_kl_student_gradient_avx2,
    softmax_kl_student_gradient_avx512, softmax_kl_student_gradient_neon;
SoftmaxKlBackward softmax_kl_teacher_gradient_scalar, softmax_kl_teacher_gradient_avx2,
    softmax_kl_teacher_gradient_avx512, softmax_kl_teacher_gradient_neon;

}  // namespace trine
