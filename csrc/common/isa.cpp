#include "common/isa.h"

#include <atomic>
#include <cstdint>
#include <stdexcept>

namespace trine {
namespace {

uint32_t bit(Isa isa) { return 1u << static_cast<int>(isa); }

// The instruction set itself and those whose every feature it has.
uint32_t included_in(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return bit(isa);
    case Isa::avx2:
      return bit(isa) | included_in(Isa::scalar);
    case Isa::avx512:
      return bit(isa) | included_in(Isa::avx2);
    case Isa::avx512vnni:
      return bit(isa) | included_in(Isa::avx512);
  }
  return bit(Isa::scalar);
}

uint32_t detect() {
  uint32_t found = bit(Isa::scalar);
#if defined(TRINE_X86)
  __builtin_cpu_init();  // reads XCR0 too: a feature counts only if the system saves its registers
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    found |= bit(Isa::avx2);
  if ((found & bit(Isa::avx2)) && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found |= bit(Isa::avx512);
  if ((found & bit(Isa::avx512)) && __builtin_cpu_supports("avx512vnni"))
    found |= bit(Isa::avx512vnni);
#endif
  return found;
}

uint32_t supported() {
  static const uint32_t found = detect();
  return found;
}

std::atomic<uint32_t>& enabled() {
  static std::atomic<uint32_t> mask{supported()};
  return mask;
}

}  // namespace

const std::vector<Isa>& all_isas() {
  static const std::vector<Isa> isas{Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512vnni};
  return isas;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return "scalar";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512vnni:
      return "avx512vnni";
  }
  return "unknown";
}

bool isa_supported(Isa isa) { return supported() & bit(isa); }
bool isa_enabled(Isa isa) { return enabled().load(std::memory_order_relaxed) & bit(isa); }

void lower_isa(Isa isa) {
  if (!isa_supported(isa))
    throw std::invalid_argument(std::string("this processor cannot run ") + isa_name(isa) +
                                " kernels; trine.backends.cpu_isas() lists what it can run");
  enabled() = included_in(isa);
}

void restore_isa() { enabled() = supported(); }

Isa highest_isa() {
  Isa highest = Isa::scalar;
  for (Isa isa : all_isas())
    if (isa_enabled(isa)) highest = isa;
  return highest;
}

}  // namespace trine
