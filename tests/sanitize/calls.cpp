#include "calls.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>
#include <random>

#include "common/float_types.h"
#include "int8_linear/int8_linear.h"
#include "int8_weight_linear/int8_weight_linear.h"
#include "quantize_rows/quantize_rows.h"
#include "sparse24_linear/sparse24_linear.h"
#include "ternary24_linear/ternary24_linear.h"
#include "ternary_linear/ternary_linear.h"

namespace sanitize {
namespace {

using Optional = std::optional<Tensor>;
using torch::stable::registered_as;

thread_local std::mt19937 engine(1);
int64_t random_in(int64_t low, int64_t high) { return low + int64_t(engine() % (high - low + 1)); }

void set(const Tensor& tensor, int64_t at, float value) {
  void* data = tensor.mutable_data_ptr();
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return trine::narrow(value, static_cast<float*>(data) + at);
    case ScalarType::BFloat16:
      return trine::narrow(value, static_cast<trine::bfloat16*>(data) + at);
    default:
      return trine::narrow(value, static_cast<trine::float16*>(data) + at);
  }
}

template <class T>
T* values_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

float random_value(Values values) {
  if (values != Values::random) return 1.0f;
  return std::normal_distribution<float>()(engine);
}

Tensor floats(const Tensor::Sizes& sizes, ScalarType type, Values values) {
  const Tensor tensor(sizes, type);
  for (int64_t i = 0; i < tensor.numel(); ++i) set(tensor, i, random_value(values));
  return tensor;
}

// One row in three is special. `gap`: elements between rows.
Tensor float_rows(int64_t m, int64_t k, ScalarType type, int64_t gap, Values values) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kSpecial[] = {0.0f, 1e-38f, 6e4f, kInfinity, std::nanf("")};
  const Tensor rows({m, k}, {k + gap, 1}, type);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < k; ++j) set(rows, i * (k + gap) + j, random_value(values));
    if (values == Values::random && i % 3 == 1 && k > 0)
      set(rows, i * (k + gap) + random_in(0, k - 1), kSpecial[i / 3 % 5]);
  }
  return rows;
}

// The first row is full of 0xff, the second of 0x80.
Tensor random_bytes(Tensor::Sizes sizes, ScalarType type) {
  const Tensor tensor(sizes, type);
  auto* bytes = values_of<uint8_t>(tensor);
  const int64_t row_bytes = sizes[1] * tensor.element_size();
  for (int64_t i = 0; i < sizes[0] * row_bytes; ++i)
    bytes[i] = i < row_bytes ? 0xff : i < 2 * row_bytes ? 0x80 : engine() & 0xff;
  return tensor;
}

Tensor int8_rows(int64_t n, int64_t columns, int64_t padded, Values values) {
  if (values == Values::impossible) return random_bytes({n, padded}, ScalarType::Char);
  const Tensor packed({n, padded}, ScalarType::Char);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < padded; ++j)
      values_of<int8_t>(packed)[i * padded + j] = j >= columns ? 0
                                                  : values == Values::extreme
                                                      ? (i % 2 ? 127 : -127)
                                                      : random_in(-127, 127);
  return packed;
}

Optional bias_of(int64_t n, ScalarType type, bool present, Values values) {
  return present ? Optional(floats({n}, type, values)) : std::nullopt;
}

Call quantize_rows(const Shape& shape, ScalarType type, int variant, Values values) {
  const Tensor x = float_rows(shape.m, shape.k, type, variant, values);
  return [=] {
    const auto [q, scale, sum] =
        registered_as<std::tuple<Tensor, Tensor, Tensor>(const Tensor&)>("quantize_rows")(x);
    return std::vector{q, scale, sum};
  };
}

// 0: parameters in float; 1: strided, parameters in x's type; 2: no parameters.
Call rms_norm_quantize_rows(const Shape& shape, ScalarType type, int variant, Values values) {
  const Tensor x = float_rows(shape.m, shape.k, type, variant, values);
  Optional weight;
  if (variant < 2) weight = floats({shape.k}, variant ? type : ScalarType::Float, values);
  return [=] {
    const auto [q, scale, sum] =
        registered_as<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Optional&, double)>(
            "rms_norm_quantize_rows")(x, weight, 1e-5);
    return std::vector{q, scale, sum};
  };
}

Call layer_norm_quantize_rows(const Shape& shape, ScalarType type, int variant, Values values) {
  const Tensor x = float_rows(shape.m, shape.k, type, variant, values);
  const auto parameter = [&] {
    return variant < 2 ? Optional(floats({shape.k}, variant ? type : ScalarType::Float, values))
                       : std::nullopt;
  };
  const Optional weight = parameter(), bias = parameter();
  return [=] {
    const auto [q, scale, sum] = registered_as<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, const Optional&, const Optional&, double)>("layer_norm_quantize_rows")(
        x, weight, bias, 1e-5);
    return std::vector{q, scale, sum};
  };
}

constexpr int64_t kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3;

// A linear op on rows that were quantised before.
Call on_rows(const std::string& op, const Shape& shape, ScalarType type, const Tensor& packed,
             const Tensor& weight_scale, const Optional& bias, Values values) {
  const auto [m, n, k] = shape;
  const Tensor q = int8_rows(m, k, k, values == Values::impossible ? Values::random : values);
  const Tensor scale = floats({m}, ScalarType::Float, values), sum({m}, ScalarType::Int);
  for (int64_t i = 0; i < m; ++i) {
    int32_t& total = values_of<int32_t>(sum)[i] = 0;
    for (int64_t j = 0; j < k; ++j) total += values_of<int8_t>(q)[i * k + j];
  }
  return [=] {
    return std::vector{
        registered_as<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                             const Tensor&, const Optional&, ScalarType, int64_t)>(op)(
            q, scale, sum, packed, weight_scale, bias, type, kGelu)};
  };
}

// 0: dynamic; 1: dynamic, strided, no bias; 2: static with a zero point; 3: quantised before.
Call int8_linear(const Shape& shape, ScalarType type, int variant, Values values) {
  const auto [m, n, k] = shape;
  const Tensor x = float_rows(m, k, type, variant == 1 ? 3 : 0, values);
  const Tensor packed = int8_rows(n, k, trine::round_up(k, trine::kInt8Chunk), values);
  const Tensor scale = floats({n}, ScalarType::Float, values);
  const Optional bias = bias_of(n, type, variant != 1, values);
  if (variant == 3) return on_rows("int8_linear_rows", shape, type, packed, scale, bias, values);
  Optional input_scale, zero_point;
  if (variant == 2) {
    input_scale.emplace(Tensor::Sizes{1}, ScalarType::Float);
    set(*input_scale, 0, 1.0f / 127);
    zero_point.emplace(Tensor::Sizes{1}, ScalarType::Int);
    *values_of<int32_t>(*zero_point) = values == Values::extreme ? -128 : 7;
  }
  const int64_t activation = variant == 0 ? kNone : variant == 1 ? kGeluTanh : kRelu;
  return [=] {
    return std::vector{
        registered_as<Tensor(const Tensor&, const Tensor&, const Tensor&, const Optional&, int64_t,
                             const Optional&, const Optional&)>("int8_linear")(
            x, packed, scale, bias, activation, input_scale, zero_point)};
  };
}

// 0: a scale per row; 1: strided, no bias; 2: groups of 64, where they fit.
Call int8_weight_linear(const Shape& shape, ScalarType type, int variant, Values values) {
  const auto [m, n, k] = shape;
  const Tensor x = float_rows(m, k, type, variant == 1 ? 3 : 0, values);
  const Tensor packed = int8_rows(n, k, trine::round_up(k, trine::kInt8WeightChunk), values);
  Tensor::Sizes scales{n};
  if (variant == 2 && k > 0 && k % 64 == 0) scales = {n, k / 64};
  const Tensor scale = floats(scales, ScalarType::Float, values);
  const Optional bias = bias_of(n, type, variant != 1, values);
  return [=] {
    return std::vector{
        registered_as<Tensor(const Tensor&, const Tensor&, const Tensor&, const Optional&)>(
            "int8_weight_linear")(x, packed, scale, bias)};
  };
}

// m rows of a table of n rows of k. 0: int64 indices; 1: int32.
Call int8_embedding(const Shape& shape, ScalarType type, int variant, Values values) {
  const auto [m, n, k] = shape;
  const int64_t v = std::max<int64_t>(n, 1);
  const Tensor indices({m}, variant == 1 ? ScalarType::Int : ScalarType::Long);
  for (int64_t i = 0; i < m; ++i) {
    // The last row among them.
    const int64_t index = i == 0 ? v - 1 : random_in(0, v - 1);
    if (variant == 1)
      values_of<int32_t>(indices)[i] = int32_t(index);
    else
      values_of<int64_t>(indices)[i] = index;
  }
  const Tensor packed = int8_rows(v, k, trine::round_up(k, trine::kInt8Chunk), values);
  const Tensor scale = floats({v}, ScalarType::Float, values);
  return [=, k = k] {
    return std::vector{
        registered_as<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, ScalarType)>(
            "int8_embedding")(indices, packed, scale, k, type)};
  };
}

// Images of 7 x 5 under a kernel of 3 x 2. 0: dynamic, as many channels as there are columns; 1:
// depthwise, channels last, no bias; 2: two groups, static with a zero point.
Call int8_conv2d(const Shape& shape, ScalarType type, int variant, Values values) {
  const int64_t batch = std::min<int64_t>(shape.m, 3), groups = variant == 2 ? 2 : 1;
  const int64_t c = std::clamp<int64_t>(shape.k, 1, 70), n = std::clamp<int64_t>(shape.n, 1, 70);
  const bool depthwise = variant == 1, last = variant == 1;
  const Tensor x = floats(
      last ? Tensor::Sizes{batch, 7, 5, c} : Tensor::Sizes{batch, groups * c, 7, 5}, type, values);
  const int64_t channels = depthwise ? c : groups * c, outs = depthwise ? c : groups * n;
  const int64_t given = depthwise ? c : groups;
  // The layout follows from the numbers alone, also where two groups have one channel each.
  const bool by_channel = given > 1 && given == channels && given == outs;
  const int64_t blocks = trine::round_up(by_channel ? outs : outs / given, 16) / 16;
  const int64_t quads = trine::round_up(channels / given, 4) / 4;
  Tensor packed(by_channel ? Tensor::Sizes{blocks, 3, 2, 16}
                           : Tensor::Sizes{given, blocks, 3, 2, quads, 16, 4},
                ScalarType::Char);
  for (int64_t i = 0; i < packed.numel(); ++i)
    values_of<int8_t>(packed)[i] =
        static_cast<int8_t>(values == Values::extreme ? -127 : i % 255 - 127);
  const Tensor scale = floats({outs}, ScalarType::Float, values);
  const Optional bias = bias_of(outs, type, variant != 1, values);
  Optional input_scale, zero_point;
  if (variant == 2) {
    input_scale.emplace(Tensor::Sizes{1}, ScalarType::Float);
    set(*input_scale, 0, 1.0f / 127);
    zero_point.emplace(Tensor::Sizes{1}, ScalarType::Int);
    *values_of<int32_t>(*zero_point) = values == Values::extreme ? -128 : 7;
  }
  return [=] {
    using Pair = const std::vector<int64_t>&;
    return std::vector{
        registered_as<Tensor(const Tensor&, const Tensor&, const Tensor&, const Optional&, Pair,
                             Pair, Pair, int64_t, bool, const Optional&, const Optional&)>(
            "int8_conv2d")(x, packed, scale, bias, {2, 1}, {1, 1}, {1, 2}, given, last, input_scale,
                           zero_point)};
  };
}

// 0: a scale per row; 1: per tensor, strided, no bias; 2: groups of 64, where they fit; 3: as 0,
// quantised before.
Call ternary_linear(const Shape& shape, ScalarType type, int variant, Values values) {
  const auto [m, n, k] = shape;
  const Tensor x = float_rows(m, k, type, variant == 1 ? 3 : 0, values);
  const int64_t padded = trine::round_up(k, trine::kTernaryChunk);
  Tensor packed = random_bytes({n, padded / trine::kTernaryPerWord}, ScalarType::Int);
  if (values != Values::impossible)
    for (int64_t i = 0; i < n * padded / trine::kTernaryPerByte; ++i)
      for (int shift = 0; shift < 8; shift += 2) {
        uint8_t& byte = values_of<uint8_t>(packed)[i];
        if (values == Values::extreme) byte |= 3 << shift;
        if ((byte >> shift & 3) == 3) byte &= ~(1 << shift);  // the code 2
      }
  Tensor::Sizes scales{variant == 1 ? 1 : n};
  if (variant == 2 && k > 0 && k % 64 == 0) scales = {n, k / 64};
  const Tensor scale = floats(scales, ScalarType::Float, values);
  const Optional bias = bias_of(n, type, variant != 1, values);
  if (variant == 3) return on_rows("ternary_linear_rows", shape, type, packed, scale, bias, values);
  return [=] {
    return std::vector{registered_as<Tensor(const Tensor&, const Tensor&, const Tensor&,
                                            const Optional&, int64_t)>("ternary_linear")(
        x, packed, scale, bias, variant == 1 ? kNone : kGelu)};
  };
}

// Values of fp32, bf16, fp16, int8; strided and without bias for bf16.
Call sparse24_linear(const Shape& shape, ScalarType type, int variant, Values values) {
  const auto [m, n, k] = shape;
  const Tensor x = float_rows(m, k, type, variant == 1 ? 3 : 0, values);
  const int64_t chunks = (k + trine::kSparse24Columns - 1) / trine::kSparse24Columns;
  const int64_t stored = chunks * trine::kSparse24Values;
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  const Tensor weight = variant == 3 ? int8_rows(n, stored, stored, values)
                                     : floats({n, stored}, kTypes[variant], values);
  const Tensor indices = random_bytes({n, chunks * trine::kSparse24Indices}, ScalarType::Byte);
  constexpr uint8_t kAscending[] = {0x4, 0x8, 0xc, 0x9, 0xd, 0xe};
  if (values != Values::impossible)
    for (int64_t i = 0; i < indices.numel(); ++i)
      values_of<uint8_t>(indices)[i] =
          uint8_t(kAscending[random_in(0, 5)] | kAscending[random_in(0, 5)] << 4);
  Optional scale;
  if (variant == 3) scale = floats({n}, ScalarType::Float, values);
  const Optional bias = bias_of(n, type, variant != 1, values);
  return [=] {
    return std::vector{
        registered_as<Tensor(const Tensor&, const Tensor&, const Tensor&, const Optional&,
                             const Optional&)>("sparse24_linear")(x, weight, indices, bias, scale)};
  };
}

// 0: a scale per row; 1: per tensor, strided, no bias. Any bits are a weight.
Call ternary24_linear(const Shape& shape, ScalarType type, int variant, Values values) {
  const auto [m, n, k] = shape;
  const Tensor x = float_rows(m, k, type, variant == 1 ? 3 : 0, values);
  const Tensor packed = random_bytes({n, trine::ternary24_row_bytes(k)}, ScalarType::Byte);
  constexpr uint8_t kTwoPlusEach[] = {0x08, 0x82, 0x20};  // of four groups
  if (values == Values::extreme)
    for (int64_t i = 0; i < packed.numel(); ++i)
      values_of<uint8_t>(packed)[i] = kTwoPlusEach[i % packed.size(1) % 3];
  const Tensor scale = floats({variant == 1 ? 1 : n}, ScalarType::Float, values);
  const Optional bias = bias_of(n, type, variant != 1, values);
  return [=] {
    return std::vector{
        registered_as<Tensor(const Tensor&, const Tensor&, const Tensor&, const Optional&)>(
            "ternary24_linear")(x, packed, scale, bias)};
  };
}

// Of rows of classes: one in each of `count` places, which are different ones.
Tensor classes_of_rows(int64_t m, int64_t count, int64_t classes, ScalarType type) {
  const Tensor tensor({m, count}, type);
  for (int64_t i = 0; i < m * count; ++i) {
    const int64_t value = classes > 0 ? (i % count + i / count) % classes : -1;
    if (type == ScalarType::Int)
      values_of<int32_t>(tensor)[i] = int32_t(value);
    else
      values_of<int64_t>(tensor)[i] = value;
  }
  return tensor;
}

// Forward and both gradients. 0: contiguous; 1: strided; then the other divergences, strided or
// not, without some rows; 5: with labels, weights of classes, capped logits and padding; 6: the
// teacher known by some classes.
Call softmax_kl(const Shape& shape, ScalarType type, int variant, Values values) {
  const auto [m, n, k] = shape;
  const bool strided = variant % 2, labelled = variant >= 5, binned = variant == 6;
  const int64_t slots = std::min<int64_t>(k, 3), padding = variant == 5 ? 2 : 0;
  const Tensor student = float_rows(m, k + padding, type, strided ? 3 : 0, values);
  const Tensor teacher = float_rows(m, binned ? slots : k, type, strided ? 5 : 0, values);
  constexpr const char* kDivergences[] = {"forward_kl",        "reverse_kl",      "jsd",
                                          "skewed_forward_kl", "total_variation", "jsd",
                                          "forward_kl"};
  const std::string divergence = kDivergences[variant];
  Optional mask, labels, indices, weight;
  if (variant > 1) {
    mask = Tensor({m}, ScalarType::Bool);
    // Odd ones are left out: the row where a planted overlap begins must count.
    for (int64_t i = 0; i < m; ++i) values_of<bool>(*mask)[i] = i % 4 != 1;
  }
  if (labelled && k > 0) labels = classes_of_rows(m, 1, k, ScalarType::Long);
  if (variant == 5) weight = floats({k}, ScalarType::Float, Values::extreme);
  if (binned) indices = classes_of_rows(m, slots, k, ScalarType::Int);
  const double cap = variant == 5 ? 5.0 : 0.0, smoothing = labelled ? 0.1 : 0.0;
  const Tensor of_soft = floats({m}, ScalarType::Float, Values::extreme);
  const Tensor of_hard = floats({labels ? m : 0}, ScalarType::Float, Values::extreme);
  return [=, k = k] {
    const auto [soft, hard, saved] = registered_as<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, Optional, Optional, Optional, Optional, double, std::string,
        double, double, int64_t, double, double, double, double, bool)>("softmax_kl")(
        student, teacher, indices, labels, weight, mask, 2.0, divergence, 0.3, smoothing, k, 1.0,
        cap, 1.0, cap, false);
    std::vector outputs{soft, hard, saved};
    for (const bool for_teacher : {false, true})
      if (!(binned && for_teacher))
        outputs.push_back(
            registered_as<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                 Optional, Optional, Optional, Optional, double, std::string,
                                 double, double, int64_t, double, double, double, double, bool,
                                 const Tensor&, bool)>("softmax_kl_backward")(
                of_soft, of_hard, student, teacher, indices, labels, weight, mask, 2.0, divergence,
                0.3, smoothing, k, 1.0, cap, 1.0, cap, false, saved, for_teacher));
    const auto together = registered_as<std::tuple<Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, Optional, Optional, Optional, Optional, double, std::string,
        double, double, int64_t, double, double, double, double, bool, const Tensor&,
        const Tensor&)>("softmax_kl_with_gradient")(student, teacher, indices, labels, weight, mask,
                                                    2.0, divergence, 0.3, smoothing, k, 1.0, cap,
                                                    1.0, cap, false, of_soft, of_hard);
    outputs.push_back(std::get<2>(together));
    return outputs;
  };
}

}  // namespace

const std::vector<Op> kOps{
    {"quantize_rows", 2, quantize_rows, {{0, trine::kQuantizeRowsMaxK}}},
    {"rms_norm_quantize_rows", 3, rms_norm_quantize_rows, {}},
    {"layer_norm_quantize_rows", 3, layer_norm_quantize_rows, {}},
    {"int8_linear", 4, int8_linear, {{0, trine::kInt8MaxK}, {2, trine::kInt8MaxKStatic}}},
    {"int8_weight_linear", 3, int8_weight_linear, {}},
    {"int8_conv2d", 3, int8_conv2d, {}},
    {"int8_embedding", 2, int8_embedding, {}},
    {"ternary_linear", 4, ternary_linear, {{0, trine::kTernaryMaxK}}},
    {"sparse24_linear", 4, sparse24_linear, {{3, trine::kSparse24Int8MaxK}}},
    {"ternary24_linear", 2, ternary24_linear, {{0, trine::kTernary24MaxK}}},
    {"softmax_kl", 7, softmax_kl, {}},
};

}  // namespace sanitize
