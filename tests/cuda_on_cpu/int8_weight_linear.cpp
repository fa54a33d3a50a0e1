// Runs int8_weight_linear's CUDA kernels on the case on standard input. Arguments: the schedule's
// seed, the device's compute capability.
//
// A case: type of x and y, m, n, k, bytes of a row of x, bytes of a packed row, groups, type of the
// bias or -1; then x, packed weight, weight scales, bias. The answer: y.
#include "int8_weight_linear/cuda.h"

#include <cstdlib>

#include "common/cuda/launch.cuh"
#include "driver.h"
#include "emulator.h"

int main(int, char** arguments) {
  using cuda_on_cpu::GuardedBuffer, cuda_on_cpu::read_number;
  cuda_on_cpu::set_seed(std::strtoull(arguments[1], nullptr, 10));
  trine::emulated_capability = std::atoi(arguments[2]);
  const auto type = static_cast<trine::FloatType>(read_number());
  const auto size = std::size_t(trine::kFloatBytes[static_cast<int>(type)]);
  const int64_t m = read_number(), n = read_number(), k = read_number();
  const int64_t x_bytes = read_number(), packed_bytes = read_number(), groups = read_number();
  const int64_t bias_type = read_number();
  GuardedBuffer x("x", std::size_t(m * x_bytes), size == 4 ? 4 : 16);
  GuardedBuffer weight("the weight", std::size_t(n * packed_bytes), 16);
  GuardedBuffer scale("the weight scales", std::size_t(n * groups) * 4, 4);
  const std::size_t bias_size = bias_type < 0 ? 0 : std::size_t(trine::kFloatBytes[bias_type]);
  GuardedBuffer bias("the bias", std::size_t(n) * bias_size, 2);
  GuardedBuffer y("y", std::size_t(m * n) * size, size);
  for (GuardedBuffer* input : {&x, &weight, &scale, &bias}) input->read();

  trine::DeviceWeightLinear problem = {};
  problem.linear.m = m;
  problem.linear.n = n;
  problem.linear.q = x.data<int8_t>();
  problem.linear.q_stride = x_bytes;
  problem.linear.weight = weight.data<uint8_t>();
  problem.linear.weight_stride = packed_bytes;
  problem.linear.weight_scale = scale.data<float>();
  problem.linear.y = y.data<void>();
  problem.linear.type = type;
  if (bias_type >= 0) {
    problem.linear.bias = bias.data<void>();
    problem.linear.bias_type = static_cast<trine::FloatType>(bias_type);
  }
  problem.k = k;
  problem.x_bytes = x_bytes;
  problem.groups = groups;
  problem.group_size = k / groups;
  trine::int8_weight_linear_cuda(problem, nullptr);
  y.write();
}
