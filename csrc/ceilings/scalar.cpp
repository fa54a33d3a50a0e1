#include "ceilings/ceilings.h"

#include "ceilings/read.h"

namespace trine {

uint64_t read_scalar(const void* data, int64_t bytes, int streams, int64_t ahead) {
  return read_streams<Word>(data, bytes, streams, ahead);
}

float dot_int8_scalar(int64_t repeats) {
  volatile int8_t seed = 3;
  const int32_t a = seed, b = seed;
  uint32_t sums[kAccumulators] = {};
  for (int64_t i = 0; i < repeats; ++i)
    for (uint32_t& sum : sums) sum = sum * uint32_t(a) + uint32_t(b);
  uint32_t total = 0;
  for (uint32_t sum : sums) total += sum;
  return static_cast<float>(total);
}

float fma_fp32_scalar(int64_t repeats) {
  volatile float seed = 0.5f;
  const float a = seed, b = seed;
  float sums[kAccumulators] = {};
  for (int64_t i = 0; i < repeats; ++i)
    for (float& sum : sums) sum = sum * a + b;
  float total = 0;
  for (float sum : sums) total += sum;
  return total;
}

}  // namespace trine
