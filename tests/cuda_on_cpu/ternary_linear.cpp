// Runs ternary_linear's CUDA kernels; linear_case.h says on what. More than n scales mean groups.
#include "linear_case.h"
#include "quantize_rows/cuda.cu"
#include "ternary_linear/cuda.cu"
#include "ternary_linear/cuda_sm90a.cu"

int main(int, char** arguments) {
  return cuda_on_cpu::run_linear_cases(arguments, [](cuda_on_cpu::LinearCase& one) {
    const trine::DeviceLinear linear = one.prepare();
    if (one.scales > one.n)
      trine::ternary_linear_grouped_cuda(linear, one.k * one.n / one.scales, one.scales / one.n,
                                         nullptr);
    else
      trine::ternary_linear_cuda(linear, nullptr);
  });
}
