// softmax_kl on a GPU; softmax_kl.h has the formulas. All pointers are to the device's memory.
#pragma once

#include <cstdint>

#include "common/cuda/stream.h"
#include "common/float_types.h"
#include "softmax_kl/softmax_kl.h"

namespace trine {

// Logits of the student or of the teacher, and how they are seen: exp(z / T) is 2^(x * rate), or
// with a cap 2^(tanh(x * slope) * rate).
struct LogitsOnDevice {
  const char* data;
  FloatType type;
  int64_t row_bytes;
  float rate;
  float slope;  // 0: no cap
};

// Cross entropy with labels, at T = 1.
struct LabelsOnDevice {
  const int64_t* labels;      // null: none
  const float* class_weight;  // null: all are 1
  float smoothing;
  float rate;  // as that of the student, with T = 1
};

// The classes that the teacher is known of, [rows][count]; its logits are then log-probabilities.
struct TopKOnDevice {
  bool given;  // false: it is known of all
  bool wide;   // int64, otherwise int32
  int count;
  const void* indices;
};

struct SoftmaxKlOnDevice {
  int64_t rows;
  int classes;
  LogitsOnDevice first, second;  // student and teacher, or reversed the other way round
  bool reversed;
  Divergence divergence;
  const bool* row_mask;  // null: all rows count
  LabelsOnDevice hard;
  TopKOnDevice top_k;
};

// What forward leaves to backward of a row.
struct SavedRow {
  float first_origin, second_origin;  // what was subtracted from the logits: their maximum, nearly
  float first_inverse, second_inverse;  // 1 / sum of exp
  float log2_ratio;                     // of the first sum to the second; NaN: no loss
  float first_mean, second_mean;  // the formula's G and H, or for a KL in H's place a mean in bits
  float hard_factor;              // of exp in the gradient of the cross entropy
};

struct GradientOnDevice {
  const float *grad_soft, *grad_hard;  // [rows]; grad_hard is null where there are no labels
  bool for_teacher;
  void* gradient;  // [rows][width], of the logits' type
  int64_t width;   // zero from `classes` on
};

void softmax_kl_cuda(const SoftmaxKlOnDevice& problem, float* soft, float* hard, SavedRow* saved,
                     cudaStream_t stream);
// What forward gives, and backward's gradient for the student, for gradients of the losses that are
// known beforehand. On sm_90 in one pass over memory, where a row fits into a cluster.
void softmax_kl_with_gradient_cuda(const SoftmaxKlOnDevice& problem, float* soft, float* hard,
                                   SavedRow* saved, const GradientOnDevice& gradient,
                                   cudaStream_t stream);
// False where there is no such kernel: for a teacher known of some classes, and rows of more than
// some 450 thousand classes of 16 bits, or 220 thousand where either row is of 32.
bool softmax_kl_one_pass_cuda(const SoftmaxKlOnDevice& problem, float* soft, float* hard,
                              SavedRow* saved, const GradientOnDevice& gradient,
                              cudaStream_t stream);
// Multiplies a gradient [rows][width] by a factor on the device; for 1 it touches nothing.
void softmax_kl_scale_cuda(void* gradient, FloatType type, int64_t rows, int64_t width,
                           const float* factor, cudaStream_t stream);
void softmax_kl_backward_cuda(const SoftmaxKlOnDevice& problem, const SavedRow* saved,
                              const GradientOnDevice& gradient, cudaStream_t stream);

}  // namespace trine
