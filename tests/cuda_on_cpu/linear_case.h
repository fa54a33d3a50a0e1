// A case of an integer linear op, from standard input to standard output, on the kernels' host
// functions.
//
// A case: type of x and y, m, n, k, bytes of a packed row, number of weight scales, type of the
// bias or -1, 1 if static plus twice the activation, then x, packed weight, weight scales, bias,
// input scale, zero point. The answer: y.
#pragma once

#include <cstdlib>

#include "common/cuda/launch.cuh"
#include "common/cuda/linear.h"
#include "driver.h"
#include "emulator.h"
#include "quantize_rows/cuda.h"

namespace cuda_on_cpu {

struct LinearCase {
  trine::FloatType type = static_cast<trine::FloatType>(read_number());
  int64_t m = read_number(), n = read_number(), k = read_number();
  int64_t packed_bytes = read_number(), scales = read_number(), bias_type = read_number();
  int64_t options = read_number();
  bool fixed = options % 2 != 0;
  std::size_t size = std::size_t(trine::kFloatBytes[static_cast<int>(type)]);
  int64_t width = (k + trine::kActivationAlignment - 1) / trine::kActivationAlignment *
                  trine::kActivationAlignment;

  GuardedBuffer x{"x", std::size_t(m * k) * size, 16};
  GuardedBuffer weight{"the weight", std::size_t(n * packed_bytes), 16};
  GuardedBuffer weight_scale{"the weight scales", std::size_t(scales) * 4, 4};
  GuardedBuffer bias{"the bias", bias_type < 0 ? 0 : std::size_t(n) * bias_bytes(), 2};
  GuardedBuffer input_scale{"the input scale", 4, 4}, zero_point{"the zero point", 4, 4};
  GuardedBuffer y{"y", std::size_t(m * n) * size, 16};
  GuardedBuffer q{"q", std::size_t(m * width), 16};
  GuardedBuffer x_scale{"the scales of x", std::size_t(m) * 4, 4};
  GuardedBuffer x_sum{"the sums of x", std::size_t(m) * 4, 4};
  GuardedBuffer minus{"the column terms", std::size_t(n) * 4, 4};

  // With the activations quantised.
  trine::DeviceLinear prepare() {
    trine::DeviceLinear linear = prepare_weight();
    if (fixed) input_scale.read(), zero_point.read();
    const trine::QuantizedOnDevice to = {q.data<int8_t>(), width, x_scale.data<float>(),
                                         x_sum.data<int32_t>()};
    const int64_t row_bytes = k * int64_t(size);
    if (fixed)
      trine::quantize_rows_static_cuda(x.data<void>(), type, m, k, row_bytes,
                                       {input_scale.data<float>(), zero_point.data<int32_t>()}, to,
                                       nullptr);
    else
      trine::quantize_rows_cuda(x.data<void>(), type, m, k, row_bytes, to, nullptr);
    linear.q = to.q;
    linear.q_stride = width;
    linear.x_scale = to.scale;
    linear.x_sum = to.sum;
    return linear;
  }

  // All but the activations.
  trine::DeviceLinear prepare_weight() {
    for (GuardedBuffer* input : {&x, &weight, &weight_scale, &bias}) input->read();
    trine::DeviceLinear linear = {};
    linear.m = m;
    linear.n = n;
    linear.weight = weight.data<uint8_t>();
    linear.weight_stride = packed_bytes;
    linear.weight_scale = weight_scale.data<float>();
    linear.per_tensor = scales == 1 && n != 1;
    linear.y = y.data<void>();
    linear.type = type;
    linear.activation = static_cast<trine::Activation>(options / 2);
    if (bias_type >= 0) {
      linear.bias = bias.data<void>();
      linear.bias_type = static_cast<trine::FloatType>(bias_type);
    }
    return linear;
  }

  void answer() const {
    for (const GuardedBuffer* inner : {&q, &x_scale, &x_sum, &minus}) inner->check_not_overrun();
    y.write();
  }

 private:
  std::size_t bias_bytes() const { return std::size_t(trine::kFloatBytes[bias_type]); }
};

// The main function. Arguments: the schedule's seed, the device's compute capability.
template <class Run>
int run_linear_case(char** arguments, const Run& run) {
  set_seed(std::strtoull(arguments[1], nullptr, 10));
  trine::emulated_capability = std::atoi(arguments[2]);
  LinearCase linear_case;
  run(linear_case);
  linear_case.answer();
  return 0;
}

}  // namespace cuda_on_cpu
