// The three floating types that ops take, and their conversion to and from float.
//
// Everything here is static: each kernel file compiles its own copy with its own instruction set,
// and the linker must never swap one for another.
#pragma once

#include <cstdint>
#include <cstring>

namespace trine {

enum class FloatType { float32, bfloat16, float16 };

inline constexpr int64_t kFloatBytes[] = {4, 2, 2};

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

namespace {

[[maybe_unused]] inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
[[maybe_unused]] inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

[[maybe_unused]] inline float widen(float x) { return x; }

[[maybe_unused]] inline float widen(bfloat16 x) { return from_bits(uint32_t(x.bits) << 16); }

[[maybe_unused]] inline float widen(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x400u)  // exponent bias 15 to 127
    return from_bits(sign | ((magnitude << 13) + 0x38000000u));
  // A subnormal: its unit, 2^-24, is the last bit of 0.5. No operand here is a subnormal float, for
  // torch.set_flush_denormal(True) makes the processor read those as 0.
  const float value = from_bits(0x3f000000u | magnitude) - 0.5f;
  return from_bits(sign | to_bits(value));
}

[[maybe_unused]] inline void narrow(float x, float* out) { *out = x; }

// Round to nearest even; every NaN becomes the canonical quiet one, as in torch.
[[maybe_unused]] inline void narrow(float x, bfloat16* out) {
  const uint32_t bits = to_bits(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = is_nan ? 0x7fc0u : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

[[maybe_unused]] inline void narrow(float x, float16* out) {
  const uint32_t bits = to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {  // NaN
    out->bits = uint16_t(sign | 0x7e00u);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    out->bits = uint16_t(sign | 0x7c00u);
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is subnormal: adding 0.5 lines its last bit, 2^-24, up with the last
    // bit of a float, so that the addition itself rounds to nearest even.
    const uint32_t rounded = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
    out->bits = uint16_t(sign | rounded);
  } else {
    const uint32_t rebased = magnitude - 0x38000000u;  // exponent bias 127 to 15
    out->bits = uint16_t(sign | ((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13));
  }
}

}  // namespace
}  // namespace trine
