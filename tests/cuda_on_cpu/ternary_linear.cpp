// Runs ternary_linear's CUDA kernels; linear_case.h says on what. More than n scales mean groups.
#include "ternary_linear/cuda.h"

#include "linear_case.h"

int main(int, char** arguments) {
  return cuda_on_cpu::run_linear_case(arguments, [](cuda_on_cpu::LinearCase& one) {
    const trine::DeviceLinear linear = one.prepare();
    if (one.scales > one.n)
      trine::ternary_linear_grouped_cuda(linear, one.k * one.n / one.scales, one.scales / one.n,
                                         nullptr);
    else
      trine::ternary_linear_cuda(linear, nullptr);
  });
}
