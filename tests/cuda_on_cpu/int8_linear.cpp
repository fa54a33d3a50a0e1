// Runs int8_linear's CUDA kernels; linear_case.h says on what.
#include "int8_linear/cuda.cu"
#include "int8_linear/cuda_sm90a.cu"
#include "linear_case.h"
#include "quantize_rows/cuda.cu"

int main(int, char** arguments) {
  return cuda_on_cpu::run_linear_cases(arguments, [](cuda_on_cpu::LinearCase& one) {
    trine::DeviceLinear linear = one.prepare();
    if (one.fixed) {
      trine::int8_zero_point_cuda(linear, one.zero_point.data<int32_t>(), one.minus.data<int32_t>(),
                                  nullptr);
      linear.column_minus = one.minus.data<int32_t>();
    }
    trine::int8_linear_cuda(linear, nullptr);
  });
}
