// INT8 on Arm's matrix instructions: pairs of packed rows are interleaved as they are read, or once
// for many rows of x, see gemm_i8mm.h. The row sums that a zero point needs come from dot products.
#include "common/arm/gemm_i8mm.h"
#include "int8_linear/tile.h"

namespace trine {
namespace {

struct PairedInt8Weight : PackedInt8Weight {};

void integer_linear(const QuantizedRows& x, const PairedInt8Weight& weight, int64_t k,
                    const Scaling& scaling, const LinearOutput& out, const Tile& tile) {
  i8mm_linear<PackedInt8Weight>(x, weight, k, scaling, out, tile);
}

}  // namespace

void int8_linear_i8mm(const QuantizedRows& x, int32_t input_zero_point, const Int8Weight& weight,
                      const LinearOutput& out, const Tile& tile) {
  int8_linear_tile<PairedInt8Weight>(x, input_zero_point, weight, out, tile);
}

}  // namespace trine
