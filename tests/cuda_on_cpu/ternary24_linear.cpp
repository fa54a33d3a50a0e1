// Runs ternary24_linear's CUDA kernels; linear_case.h says on what. More rows than the first of
// them takes: the weight is unpacked alone, and the answer its values and indices in place of y.
#include "ternary24_linear/cuda.h"

#include "linear_case.h"

int main(int, char** arguments) {
  using cuda_on_cpu::GuardedBuffer;
  cuda_on_cpu::set_seed(std::strtoull(arguments[1], nullptr, 10));
  cuda_on_cpu::LinearCase one;
  const trine::DeviceLinear linear = one.prepare();
  if (one.m <= trine::kTernary24FewRows) {
    trine::ternary24_linear_few_cuda(linear, nullptr);
    one.answer();
    return 0;
  }
  const int64_t chunks = (one.k + 31) / 32;
  GuardedBuffer values("the values", std::size_t(one.n * chunks) * 16, 16);
  GuardedBuffer indices("the indices", std::size_t(one.n * chunks) * 4, 4);
  trine::ternary24_unpack_cuda(linear.weight, linear.weight_stride, one.n, one.k,
                               values.data<int8_t>(), indices.data<uint32_t>(), nullptr);
  values.write();
  indices.write();
}
