// Calls of the operators with made-up inputs.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace sanitize {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Shape {
  int64_t m, n, k;  // rows, output features, input features; softmax_kl: m rows of k classes
};

enum class Values {
  random,      // some rows of x hold zeros, NaN, infinity, huge or tiny numbers
  extreme,     // every product is the largest there is, and of one sign
  impossible,  // the same x; packed weights of any bits, as only a damaged checkpoint holds them
};

// Inputs are made once; each call gives fresh outputs and may run beside others.
using Call = std::function<std::vector<Tensor>()>;

struct Op {
  std::string name;
  int variants;  // kinds of weight, bias, static input, strided x
  Call (*make)(const Shape&, ScalarType type_of_x, int variant, Values);
  std::vector<std::pair<int, int64_t>> longest;  // variants, and the largest K that each takes
};

extern const std::vector<Op> kOps;

}  // namespace sanitize
