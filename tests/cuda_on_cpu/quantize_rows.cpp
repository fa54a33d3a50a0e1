// Runs quantize_rows_cuda on the case on standard input; the first argument is the schedule's seed.
//
// A case: type, m, k, bytes from row to row, alignment of x, alignment of q, bytes of x, x. The
// answer: q, scale, sum.
#include "quantize_rows/cuda.h"

#include <cstdlib>

#include "driver.h"
#include "emulator.h"

int main(int, char** arguments) {
  using cuda_on_cpu::GuardedBuffer, cuda_on_cpu::read_number;
  cuda_on_cpu::set_seed(std::strtoull(arguments[1], nullptr, 10));
  const auto type = static_cast<trine::FloatType>(read_number());
  const int64_t m = read_number(), k = read_number(), row_bytes = read_number();
  const int64_t x_alignment = read_number(), q_alignment = read_number();
  GuardedBuffer x("x", read_number(), x_alignment);
  GuardedBuffer q("q", m * k, q_alignment);
  GuardedBuffer scale("scale", m * sizeof(float), alignof(float));
  GuardedBuffer sum("sum", m * sizeof(int32_t), alignof(int32_t));
  x.read();
  trine::quantize_rows_cuda(x.data<char>(), type, m, k, row_bytes,
                            {q.data<int8_t>(), k, scale.data<float>(), sum.data<int32_t>()},
                            nullptr);
  q.write();
  scale.write();
  sum.write();
}
