// Runs sparse24_linear's CUDA kernels; linear_case.h says on what. `weight` is the values, of as
// many weight scales as rows if they are int8, none if they are of x's type; indices come last.
#include "sparse24_linear/cuda.h"

#include <cstring>

#include "linear_case.h"

int main(int, char** arguments) {
  return cuda_on_cpu::run_linear_case(arguments, [](cuda_on_cpu::LinearCase& one) {
    using trine::Sparse24Values;
    const bool int8 = one.scales > 0;
    trine::DeviceSparse24 sparse = {};
    sparse.values = int8                                     ? Sparse24Values::int8
                    : one.type == trine::FloatType::bfloat16 ? Sparse24Values::bfloat16
                                                             : Sparse24Values::float16;
    sparse.chunks = one.packed_bytes / (int8 ? 16 : 32);
    // Rows of 16-bit x, each ending at a multiple of 16 bytes, and a gap behind them.
    const std::size_t row = std::size_t(one.k) * one.size, whole = (row + 15) / 16 * 16;
    const std::size_t stride = whole + 16;
    cuda_on_cpu::GuardedBuffer rows("the rows of x", one.m * stride - (one.m > 0 ? 16 : 0), 16);
    sparse.linear = int8 ? one.prepare() : one.prepare_weight();
    sparse.x_bytes = one.width;
    if (!int8) {
      for (std::size_t m = 0; m < std::size_t(one.m); ++m) {
        unsigned char* const to = rows.data<unsigned char>() + m * stride;
        std::memcpy(to, one.x.data<unsigned char>() + m * row, row);
        std::memset(to + row, 0, whole - row);
      }
      sparse.linear.q = rows.data<int8_t>();
      sparse.linear.q_stride = int64_t(stride);
      sparse.x_bytes = int64_t(whole);
    }
    cuda_on_cpu::GuardedBuffer indices("the indices", std::size_t(one.n * sparse.chunks) * 4, 16);
    indices.read();
    sparse.indices = indices.data<uint32_t>();
    trine::sparse24_linear_cuda(sparse, nullptr);
    rows.check_not_overrun();
  });
}
