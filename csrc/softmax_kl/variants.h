// Which of a kernel's variants a problem needs.
#pragma once

#include "softmax_kl/cuda.h"

namespace trine {
namespace {

// Calls run<kGeneral, kPrecise>() for this problem.
template <class Run>
void with_variant(const SoftmaxKlOnDevice& problem, const Run& run) {
  const bool general = problem.divergence.kind != Divergence::kullback_leibler ||
                       problem.first.slope != 0 || problem.second.slope != 0;
  // fp32 logits deserve all digits.
  const auto is_float = [](const LogitsOnDevice& side) { return side.type == FloatType::float32; };
  const bool precise = is_float(problem.first) || is_float(problem.second);
  if (general)
    precise ? run.template operator()<true, true>() : run.template operator()<true, false>();
  else
    precise ? run.template operator()<false, true>() : run.template operator()<false, false>();
}

}  // namespace
}  // namespace trine
