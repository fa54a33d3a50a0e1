// Runs int8_linear's CUDA kernels; linear_case.h says on what.
#include "int8_linear/cuda.h"

#include "linear_case.h"

int main(int, char** arguments) {
  return cuda_on_cpu::run_linear_case(arguments, [](cuda_on_cpu::LinearCase& one) {
    trine::DeviceLinear linear = one.prepare();
    if (one.fixed) {
      trine::int8_zero_point_cuda(linear, one.zero_point.data<int32_t>(), one.minus.data<int32_t>(),
                                  nullptr);
      linear.column_minus = one.minus.data<int32_t>();
    }
    trine::int8_linear_cuda(linear, nullptr);
  });
}
