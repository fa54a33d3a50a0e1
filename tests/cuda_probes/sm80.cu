// Which lane holds which element of the matrix fragments of sm_80, found by one-hot inputs; and
// what cp.async writes; whether the multi-function unit is as exact as math.cuh says. Prints raw
// results, the same on a GPU and under the emulation.
#include <cstdlib>

#include "common/cuda/async_copy.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/math.cuh"
#include "common/cuda/matrix.cuh"
#include "common/cuda/pairs.cuh"
#include "probe_memory.cuh"

namespace {

using namespace trine;

// The bits of a small whole number.
template <class Operands>
__device__ uint32_t element(int number) {
  if constexpr (std::is_same_v<Operands, S8>) return uint32_t(number) & 0xffu;
  const float value = float(number);
  const uint32_t bits = __float_as_uint(value);
  if constexpr (std::is_same_v<Operands, Bf16>) return bits >> 16;
  // Normal half precision numbers and zero: another exponent bias, 13 bits less of fraction.
  return number == 0 ? 0 : (bits >> 13 & 0x3ffu) | (((bits >> 23) - 127 + 15) << 10);
}

// For each element of A alone being 1, and B telling first the lane, then the index of each of its
// elements: all sums. A sum that is not zero names the element of B that met that of A. Both count
// from 1.
template <class Operands, class Sum>
__global__ void __launch_bounds__(32) probe_multiply(Sum* out) {
  constexpr int kBits = std::is_same_v<Operands, S8> ? 8 : 16, kPerWord = 32 / kBits;
  const int lane = int(threadIdx.x);
  for (int hot = 0; hot < 32 * 4 * kPerWord; ++hot)
    for (int tell_index = 0; tell_index < 2; ++tell_index) {
      uint32_t a[4] = {}, b[2] = {};
      for (int i = 0; i < 4 * kPerWord; ++i)
        a[i / kPerWord] |= element<Operands>(hot == lane * 4 * kPerWord + i)
                           << i % kPerWord * kBits;
      for (int i = 0; i < 2 * kPerWord; ++i)
        b[i / kPerWord] |= element<Operands>((tell_index ? i : lane) + 1) << i % kPerWord * kBits;
      Sum sums[4] = {};
      multiply(Operands{}, sums, a, b);
      for (int i = 0; i < 4; ++i) out[((hot * 2 + tell_index) * 32 + lane) * 4 + i] = sums[i];
    }
}

// Pairs of positions for all groups of four columns that a lane's metadata holds.
constexpr uint32_t kFirstTwo = 0x44444444u, kLastTwo = 0xeeeeeeeeu;

// As probe_multiply, for a sparse A that stores the first two values of each four.
template <class Operands, int kSelector, class Sum>
__global__ void __launch_bounds__(32) probe_multiply_sparse(Sum* out) {
  constexpr int kBits = std::is_same_v<Operands, S8> ? 8 : 16, kPerWord = 32 / kBits;
  const int lane = int(threadIdx.x);
  for (int hot = 0; hot < 32 * 4 * kPerWord; ++hot)
    for (int tell_index = 0; tell_index < 2; ++tell_index) {
      uint32_t a[4] = {}, b[4] = {};
      for (int i = 0; i < 4 * kPerWord; ++i) {
        a[i / kPerWord] |= element<Operands>(hot == lane * 4 * kPerWord + i)
                           << i % kPerWord * kBits;
        b[i / kPerWord] |= element<Operands>((tell_index ? i : lane) + 1) << i % kPerWord * kBits;
      }
      Sum sums[4] = {};
      multiply_sparse<kSelector>(Operands{}, sums, a, b, kFirstTwo);
      for (int i = 0; i < 4; ++i) out[((hot * 2 + tell_index) * 32 + lane) * 4 + i] = sums[i];
    }
}

// For each group of each lane's metadata alone naming the last two columns: all sums of an A of
// ones and of a B whose third row of each four is the number of the four, from 1, the others zero.
// A sum that is not zero names the row and the group that those bits of that lane are of.
template <class Operands, int kSelector, class Sum>
__global__ void __launch_bounds__(32) probe_metadata(Sum* out) {
  constexpr bool kBytes = std::is_same_v<Operands, S8>;
  constexpr int kBits = kBytes ? 8 : 16, kPerWord = 32 / kBits;
  const int lane = int(threadIdx.x);
  uint32_t a[4] = {}, b[4] = {};
  for (int i = 0; i < 4 * kPerWord; ++i) {
    const int k = lane % 4 * kPerWord + i % kPerWord + i / kPerWord * 4 * kPerWord;
    a[i / kPerWord] |= element<Operands>(1) << i % kPerWord * kBits;
    b[i / kPerWord] |= element<Operands>(k % 4 == 2 ? k / 4 + 1 : 0) << i % kPerWord * kBits;
  }
  for (int hot = 0; hot < 32 * 8; ++hot) {
    const uint32_t changed = hot / 8 == lane ? 0xfu << hot % 8 * 4 : 0;
    Sum sums[4] = {};
    multiply_sparse<kSelector>(Operands{}, sums, a, b,
                               (kFirstTwo & ~changed) | (kLastTwo & changed));
    for (int i = 0; i < 4; ++i) out[(hot * 32 + lane) * 4 + i] = sums[i];
  }
}

// 32 rows of 16 bytes that count up, as fragments.
__global__ void __launch_bounds__(32) probe_load_matrices(uint32_t* out) {
  TRINE_SHARED_ARRAY(uint4, rows, 32);
  const int lane = int(threadIdx.x);
  for (int i = 0; i < 4; ++i)
    reinterpret_cast<uint32_t*>(rows)[lane * 4 + i] =
        0x01010101u * uint32_t(lane * 4 + i) + 0x3020100u;
  __syncthreads();
  uint32_t fragment[4];
  load_matrices(fragment, shared_address(rows + lane));
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = fragment[i];
}

// 16 bytes a thread, or 4, every third one not valid.
template <class Unit>
__global__ void __launch_bounds__(32) probe_copy_async(const Unit* in, Unit* out) {
  TRINE_SHARED_ARRAY(Unit, copied, 32);
  const int lane = int(threadIdx.x);
  copy_async<int(sizeof(Unit))>(shared_address(copied + lane), in + lane, lane % 3 != 0);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  out[31 - lane] = copied[31 - lane];
}

template <class Operands, class Sum>
void print_multiply() {
  constexpr int kElements = std::is_same_v<Operands, S8> ? 512 : 256;
  ProbeMemory sums(kElements * 2 * 32 * 4 * sizeof(Sum));
  launch("probe", probe_multiply<Operands, Sum>, {1, 32}, nullptr, sums.data<Sum>());
  sums.print();
}

template <class Operands, int kSelector, class Sum>
void print_multiply_sparse() {
  constexpr int kElements = std::is_same_v<Operands, S8> ? 512 : 256;
  ProbeMemory sums(kElements * 2 * 32 * 4 * sizeof(Sum)), groups(256 * 32 * 4 * sizeof(Sum));
  launch("probe", probe_multiply_sparse<Operands, kSelector, Sum>, {1, 32}, nullptr,
         sums.data<Sum>());
  sums.print();
  launch("probe", probe_metadata<Operands, kSelector, Sum>, {1, 32}, nullptr, groups.data<Sum>());
  groups.print();
}

// Each byte as a pair of 16-bit floats, and what it is less 128 or, as bfloat16, 256 in the sign's
// place.
__global__ void __launch_bounds__(32) probe_pairs(uint32_t* out) {
  for (uint32_t i = threadIdx.x; i < 256; i += 32) {
    out[i] = subtract_pair_float16(0x64006400u | i | (255 - i) << 16, 0x64806480u);
    const uint32_t low = i % 128 | 0x4300u, minus = (i & 128) | 0xc300u;
    out[256 + i] = multiply_add_pair_bfloat16(low | low << 16, 0x40003f80u, minus | minus << 16);
  }
}

constexpr int kNumbers = 1 << 13;

// The numbers of one sign and of ten exponents to either side of 1, of no obvious pattern.
__device__ float some_number(uint32_t i) {
  const uint32_t mixed = (i + 1) * 0x9e3779b1u;
  return __uint_as_float((127u - 10u + i % 20u) << 23 | mixed >> 9);
}

__device__ bool is_within(float found, double exact, double allowed) {
  return fabs(double(found) - exact) <= allowed;
}

// 1 where a result is as exact as it is said to be.
__global__ void __launch_bounds__(32) probe_math(unsigned char* out) {
  for (int i = int(threadIdx.x); i < kNumbers; i += 32) {
    const float x = some_number(uint32_t(i)), exponent = (i % 2 ? -x : x) / 8;  // to +-128
    const double power = exp2(double(exponent)), logarithm = log2(double(x));
    // What is below the least normal number counts as 0.
    const bool is_normal = power >= 0x1p-126 && power < 0x1p+128;
    out[i] = is_normal ? is_within(exp2_approximate(exponent), power, power * 0x1p-22)
                       : exp2_approximate(exponent) == (power < 1 ? 0.0f : float(power));
    const bool near = x > 0.5f && x < 2.0f;
    out[kNumbers + i] =
        is_within(log2_approximate(x), logarithm, near ? 0x1p-22 : fabs(logarithm) * 0x1p-22);
    out[2 * kNumbers + i] = is_within(reciprocal_approximate(x), 1 / double(x), 0x1p-23 / x);
  }
}

// At the ends: 2^-inf, 2^inf, 2^NaN, log2 of 0 and infinity, 1 / 0, 1 / infinity.
__global__ void __launch_bounds__(32) probe_math_at_ends(float* out) {
  const float infinity = __uint_as_float(0x7f800000u), nan = __uint_as_float(0x7fffffffu);
  if (threadIdx.x != 0) return;
  out[0] = exp2_approximate(-infinity);
  out[1] = exp2_approximate(infinity);
  out[2] = exp2_approximate(nan) != exp2_approximate(nan);
  out[3] = log2_approximate(0);
  out[4] = log2_approximate(infinity);
  out[5] = reciprocal_approximate(0);
  out[6] = reciprocal_approximate(infinity);
}

}  // namespace

int main() {
  print_multiply<S8, int32_t>();
  print_multiply<F16, float>();
  print_multiply<Bf16, float>();
  print_multiply_sparse<S8, 0, int32_t>();
  print_multiply_sparse<F16, 0, float>();
  print_multiply_sparse<F16, 1, float>();
  print_multiply_sparse<Bf16, 0, float>();
  print_multiply_sparse<Bf16, 1, float>();
  ProbeMemory fragments(32 * 16), copied(32 * 16), in(32 * 16);
  launch("probe", probe_load_matrices, {1, 32}, nullptr, fragments.data<uint32_t>());
  fragments.print();
  for (int i = 0; i < 32 * 16; ++i) in.data<unsigned char>()[i] = static_cast<unsigned char>(i * 7);
  launch("probe", probe_copy_async<uint4>, {1, 32}, nullptr, in.data<const uint4>(),
         copied.data<uint4>());
  copied.print();
  ProbeMemory words(32 * 4);
  launch("probe", probe_copy_async<uint32_t>, {1, 32}, nullptr, in.data<const uint32_t>(),
         words.data<uint32_t>());
  words.print();
  ProbeMemory pairs(2 * 256 * 4);
  launch("probe", probe_pairs, {1, 32}, nullptr, pairs.data<uint32_t>());
  pairs.print();
  ProbeMemory right(3 * kNumbers), ends(7 * sizeof(float));
  launch("probe", probe_math, {1, 32}, nullptr, right.data<unsigned char>());
  right.print();
  launch("probe", probe_math_at_ends, {1, 32}, nullptr, ends.data<float>());
  ends.print();
}
