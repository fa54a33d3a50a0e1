// Runs norm_quantize_rows_cuda on the case on standard input; the first argument is the
// schedule's seed.
//
// A case: 1 for LayerNorm, the bits of eps; of the weight, then of the bias: 1 if it is float, its
// alignment and bytes (0: none); then as quantize_rows.cpp has it, and behind x the weight and the
// bias. The answer: q, scale, sum.
#include "norm_quantize_rows/cuda.h"

#include <cstdlib>

#include "driver.h"
#include "emulator.h"

int main(int, char** arguments) {
  using cuda_on_cpu::GuardedBuffer, cuda_on_cpu::read_number;
  cuda_on_cpu::set_seed(std::strtoull(arguments[1], nullptr, 10));
  const auto norm = read_number() != 0 ? trine::Norm::layer : trine::Norm::rms;
  const float eps = trine::from_bits(uint32_t(read_number()));
  struct Parameter {
    bool is_float = read_number() != 0;
    int64_t alignment = read_number(), bytes = read_number();
  };
  const Parameter of_weight, of_bias;
  const auto type = static_cast<trine::FloatType>(read_number());
  const int64_t m = read_number(), k = read_number(), row_bytes = read_number();
  const int64_t x_alignment = read_number(), q_alignment = read_number();
  GuardedBuffer x("x", read_number(), x_alignment);
  GuardedBuffer weight("the weight", of_weight.bytes, of_weight.alignment);
  GuardedBuffer bias("the bias", of_bias.bytes, of_bias.alignment);
  GuardedBuffer q("q", m * k, q_alignment);
  GuardedBuffer scale("scale", m * sizeof(float), alignof(float));
  GuardedBuffer sum("sum", m * sizeof(int32_t), alignof(int32_t));
  x.read();
  weight.read();
  bias.read();
  const auto parameter = [](const Parameter& about, GuardedBuffer& buffer) {
    const void* values = about.bytes == 0 ? nullptr : buffer.data<void>();
    return trine::ParameterOnDevice{values, about.is_float};
  };
  trine::norm_quantize_rows_cuda(
      x.data<char>(), type, m, k, row_bytes,
      {norm, parameter(of_weight, weight), parameter(of_bias, bias), eps},
      {q.data<int8_t>(), k, scale.data<float>(), sum.data<int32_t>()}, nullptr);
  q.write();
  scale.write();
  sum.write();
}
