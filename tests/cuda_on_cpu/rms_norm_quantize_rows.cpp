// Runs rms_norm_quantize_rows_cuda on the case on standard input; the first argument is the
// schedule's seed.
//
// A case: the bits of eps, 1 if the weight is float, its alignment and bytes (0: none); then as
// quantize_rows.cpp has it, and behind x the weight. The answer: q, scale, sum.
#include "rms_norm_quantize_rows/cuda.h"

#include <cstdlib>

#include "driver.h"
#include "emulator.h"

int main(int, char** arguments) {
  using cuda_on_cpu::GuardedBuffer, cuda_on_cpu::read_number;
  cuda_on_cpu::set_seed(std::strtoull(arguments[1], nullptr, 10));
  const float eps = trine::from_bits(uint32_t(read_number()));
  const bool weight_is_float = read_number() != 0;
  const int64_t weight_alignment = read_number(), weight_bytes = read_number();
  const auto type = static_cast<trine::FloatType>(read_number());
  const int64_t m = read_number(), k = read_number(), row_bytes = read_number();
  const int64_t x_alignment = read_number(), q_alignment = read_number();
  GuardedBuffer x("x", read_number(), x_alignment);
  GuardedBuffer weight("the weight", weight_bytes, weight_alignment);
  GuardedBuffer q("q", m * k, q_alignment);
  GuardedBuffer scale("scale", m * sizeof(float), alignof(float));
  GuardedBuffer sum("sum", m * sizeof(int32_t), alignof(int32_t));
  x.read();
  weight.read();
  const void* values = weight_bytes == 0 ? nullptr : weight.data<void>();
  trine::rms_norm_quantize_rows_cuda(
      x.data<char>(), type, m, k, row_bytes, {values, weight_is_float, eps},
      {q.data<int8_t>(), k, scale.data<float>(), sum.data<int32_t>()}, nullptr);
  q.write();
  scale.write();
  sum.write();
}
