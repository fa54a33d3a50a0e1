// Divergences of a student's softmax from a teacher's (Hinton et al. 2015, arXiv:1503.02531). Per
// row of n logits s (student) and t (teacher), with temperature T:
//   a = log p = log_softmax(s / T) = (s - max_s) / T - log_sum_s
//   b = log q = log_softmax(t / T) = (t - max_t) / T - log_sum_t
//   loss = T^2 * D
//   forward KL  D = KL(q || p) = sum_j q_j * (b_j - a_j)
//     d loss / d s_j = T * (p_j - q_j)
//     d loss / d t_j = T * q_j * (b_j - a_j - D)
//   the others  D = sum_j phi(p_j, q_j), with slopes g = d phi / d p, h = d phi / d q:
//     d loss / d s_j = T * p_j * (g_j - G), G = sum_k p_k * g_k
//     d loss / d t_j = T * q_j * (h_j - H), H = sum_k q_k * h_k = D - G
//     JSD(beta)   D = beta * KL(q || m) + (1 - beta) * KL(p || m), m = beta * q + (1 - beta) * p
//     skewed KL   D = KL(q || m), the same m
//     total variation  D = sum_j |p_j - q_j| / 2
//   reverse KL and skewed reverse KL are the forward ones with student and teacher exchanged.
// The operator gives D itself of every row, and the cross entropy of softmax(s) with a label. What
// becomes of them (T^2, weights, means) is PyTorch's business, on vectors of a value a row.
//
// Logits may be seen through z = cap * tanh(scale * x / cap). Of a teacher known by some of its
// classes alone, the others are one class of their own, the tail: then the rows above are the bins,
// and a student's tail has the logit T * log(sum of exp(s_j / T)) over the classes in no bin.
//
//
// Limits: exp(b_j) = 0 contributes 0, also where a_j is -inf; a_j = -inf where exp(b_j) > 0 makes
// kl +inf; NaN or +inf in a row, or a row of nothing but -inf, makes the row's loss and gradient
// NaN. The divergences with a mixture, and total variation, are finite wherever p and q are. An
// exp((s - max_s) / T) below 2^-126.5 counts as 0.
//
// Maxima and sums are kept apart: in one fp32 log-sum-exp of about 1e4 an ulp is 1e-3, and the
// probabilities would be wrong by as much.
//
// What bounds it: two exponentials an element in each direction (a table of sixteenths in a
// register where there is AVX-512: 13 multiplications and FMAs for two), and memory beside them. Of
// 16 elements in L2 a Zen 4 core, which starts one 512-bit FMA and one other operation in a cycle,
// takes 20 cycles forward and 25 backward, three quarters of what it could start; bf16 22 and 28.
// 1024 x 32000 in fp32 on two cores took 27 to 32 ms, forward and backward, page faults of a fresh
// gradient included: the bytes alone, as plain loops move them, are 19.
// A scalar loss has its gradient computed in forward, row by row, so that the logits come from
// memory once (softmax_kl_with_gradient): 0.7 to 0.9 of the time.
// Gradients written past the caches lost where their memory was fresh, and rows taken in reverse,
// for what L3 still holds of them, lost too.
// The divergences of slopes take more passes over a row in L2, for a logarithm of a sum of p and q
// needs both whole: maxima, exponentials (28 operations of a vector), slopes (60; two vectors in
// turns, for one alone is a chain too long to look past, and of four the registers spilled), and
// gradients (14). In fp32 the exponentials wait where the gradient is to be, and in L2, which takes
// 20 operations off the slopes and 10 off the gradients; every pass begins where the one before
// ended. Of 16 elements forward KL then takes 41 cycles for everything, JSD 54, skewed KL 57, total
// variation 35; of bf16, where nothing is kept, JSD takes 93. With all of it on two cores, times
// forward KL: JSD 1.2 to 1.5, skewed KL 1.1 to 1.8, total variation 0.8 to 1.2, by shape and by
// how busy the memory is. Fetching the next row while slopes are computed was lost in the noise. A
// cross entropy adds 11 cycles forward, and 8 backward in the same loop. Caps, scales, weights of
// classes and partial teachers go through buffers of a part of a row in L2.
#pragma once

#include <cstdint>
#include <limits>

#include "common/float_types.h"
#include "common/isa.h"

namespace trine {

// A row of logits in memory.
struct LogitRow {
  const void* data;
  FloatType type;
};

// Sums over a row or a part of one; with x = (s - max_student) / T and y = (t - max_teacher) / T:
struct SoftmaxKlSums {
  float max_student, max_teacher;
  float impossible_teacher;  // the largest t_j where s_j is -inf
  double student, teacher;   // sum of exp(x_j), of exp(y_j)
  double weighted;           // sum of exp(y_j) * (y_j - x_j), times T
};
inline constexpr SoftmaxKlSums kEmptySums = {-std::numeric_limits<float>::infinity(),
                                             -std::numeric_limits<float>::infinity(),
                                             -std::numeric_limits<float>::infinity(),
                                             0,
                                             0,
                                             0};

// What forward leaves to backward, as a row of the saved fp32 tensor.
struct SoftmaxKlRow {
  float max_student, max_teacher;
  float inverse_sum_teacher;
  // log2(sum_student / sum_teacher), rounded once: the log-sums themselves are known only to 1e-6
  // or so, which would be the error of a - b, and all of it where the student is close.
  float log2_ratio;                  // NaN marks a row without a loss
  float student_mean, teacher_mean;  // G, H; forward KL: 0, sum of q * (y - x), times T
};
inline constexpr int64_t kSoftmaxKlColumns = sizeof(SoftmaxKlRow) / sizeof(float);

struct Divergence {
  enum Kind { kullback_leibler, jensen_shannon, skewed_kl, total_variation } kind;
  float beta;
};

// Sums over a row or a part of one.
struct SoftmaxKlSlopes {
  double student, teacher;  // sum of exp(x_j) * g_j, of exp(y_j) * h_j
};

struct SoftmaxKlMaxima {
  float student = -std::numeric_limits<float>::infinity(), teacher = student;
};

// A kernel works on n elements of a row, all of them or a part. `rate` is log2(e) / T, so that
// exp(x / T) = 2^(x * rate).
using SoftmaxKlForward = SoftmaxKlSums(LogitRow student, LogitRow teacher, int64_t n, float rate);

// What is kept for the gradient of one model's logits, of a part whose rows are both fp32, between
// the passes over it:
//   after `exponentials`  in `gradient` its exponentials, in `scratch` the other model's
//   after `slopes`        in `gradient` its slopes, in `scratch` its exponentials
// Slopes lack the factor that the divergence has for each. Without scratch slopes alone are kept.
struct Kept {
  float *gradient = nullptr, *scratch = nullptr;
  bool of_teacher = false;
};

// The passes of all divergences but the Kullback-Leibler one, of which the sums tell everything:
// maxima of the whole row, sums of exponentials, and with what these tell in `row`, slopes. NaN
// counts in no maximum.
using SoftmaxKlFindMaxima = SoftmaxKlMaxima(LogitRow student, LogitRow teacher, int64_t n);
using SoftmaxKlExponentials = SoftmaxKlSums(LogitRow student, LogitRow teacher, int64_t n,
                                            float rate, SoftmaxKlMaxima maxima, const Kept& kept);
using SoftmaxKlSecondPass = SoftmaxKlSlopes(LogitRow student, LogitRow teacher, int64_t n,
                                            float rate, const SoftmaxKlRow& row,
                                            Divergence divergence, const Kept& kept);

// What a cross entropy adds to the gradient at logits z: factor * exp(z - max) - shift.
struct CrossEntropyTerm {
  float max = 0, factor = 0, shift = 0;
};

// Writes scale * (d loss / d logits) / T to `gradient`, whose type is that of the logits. Not for
// rows without a loss: that no NaN comes in makes rounding to bf16 cheap. A cross entropy's term
// (of factor 0: none) is added where both rows are fp32 or both bf16.
using SoftmaxKlBackward = void(LogitRow student, LogitRow teacher, int64_t n, float rate,
                               const SoftmaxKlRow& row, Divergence divergence, float scale,
                               const CrossEntropyTerm& hard, void* gradient);

// Makes the gradient at fp32 logits of slopes that a second pass left in its place.
using SoftmaxKlBackwardOfSlopes = void(const float* logits, int64_t n, float rate,
                                       const SoftmaxKlRow& row, Divergence divergence, float scale,
                                       const CrossEntropyTerm& hard, const Kept& kept);

// How logits are seen: cap * tanh(scale * x / cap); without a cap (0) scale * x.
struct LogitsSeen {
  float scale = 1, cap = 0;
  bool changes() const { return scale != 1 || cap != 0; }
};

// Of logits z of a row or a part of one: their maximum, and the sum of exp((z - max) / T).
struct SoftmaxSums {
  float max = -std::numeric_limits<float>::infinity();
  double sum = 0;
};

// Sum of weight * (z - origin), and of the weights; without weights each is 1.
struct WeightedSum {
  double logits, weights;
};

using SeeLogits = void(LogitRow x, int64_t n, LogitsSeen seen, float* z);
// Writes gradient * dz / dx, in the type of x.
using SeeLogitsBackward = void(LogitRow x, int64_t n, LogitsSeen seen, const float* gradient,
                               void* out);
using SumSoftmax = SoftmaxSums(LogitRow z, int64_t n, float rate);
using SumWeighted = WeightedSum(LogitRow z, int64_t n, const float* weight, float origin);
// Adds factor * exp((z - max) / T) - shift * weight to `gradient`.
using AddSoftmax = void(LogitRow z, int64_t n, float rate, float max, float factor,
                        const float* weight, float shift, float* gradient);

struct SoftmaxKlFunctions {
  SoftmaxKlForward* forward;
  SoftmaxKlFindMaxima* maxima;
  SoftmaxKlExponentials* exponentials;
  SoftmaxKlSecondPass* slopes;
  SoftmaxKlBackward *student_gradient, *teacher_gradient;
  SoftmaxKlBackwardOfSlopes* gradient_of_slopes;
  SeeLogits* see;
  SeeLogitsBackward* see_backward;
  SumSoftmax* sum_softmax;
  SumWeighted* sum_weighted;
  AddSoftmax* add_softmax;
};
extern const SoftmaxKlFunctions kSoftmaxKlScalar, kSoftmaxKlAvx2, kSoftmaxKlAvx512, kSoftmaxKlNeon;

}  // namespace trine
