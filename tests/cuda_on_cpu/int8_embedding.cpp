// Runs int8_embedding_cuda on the case on standard input; the first argument is the schedule's
// seed.
//
// A case: type, 1 if the indices are int64, their number, v, dim, alignment of y; indices, codes,
// scales. The answer: y.
#include "int8_embedding/cuda.h"

#include <cstdlib>

#include "driver.h"
#include "emulator.h"

int main(int, char** arguments) {
  using cuda_on_cpu::GuardedBuffer, cuda_on_cpu::read_number;
  cuda_on_cpu::set_seed(std::strtoull(arguments[1], nullptr, 10));
  const auto type = static_cast<trine::FloatType>(read_number());
  const bool wide = read_number() != 0;
  const int64_t count = read_number(), v = read_number(), dim = read_number();
  const int64_t y_alignment = read_number(), stride = (dim + 15) / 16 * 16;
  const int64_t index_bytes = wide ? 8 : 4;
  GuardedBuffer indices("indices", count * index_bytes, index_bytes);
  GuardedBuffer codes("codes", v * stride, 16);
  GuardedBuffer scale("scale", v * sizeof(float), alignof(float));
  // A little more where y is not to begin at a multiple of 16, for that is where memory ends.
  const int64_t y_bytes = count * dim * trine::kFloatBytes[static_cast<int>(type)];
  GuardedBuffer y("y", y_bytes + (y_alignment < 16 ? y_alignment : 0), y_alignment);
  indices.read();
  codes.read();
  scale.read();
  trine::int8_embedding_cuda({indices.data<void>(), wide, count, codes.data<int8_t>(), stride,
                              scale.data<float>(), v, dim, y.data<void>(), type},
                             nullptr);
  y.write();
}
