#include "common/isa.h"

#include <atomic>
#include <stdexcept>

#if defined(TRINE_X86)
#include <cpuid.h>
#elif defined(TRINE_ARM64) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace trine {
namespace {

// What a kernel may demand of a processor.
using Features = uint32_t;
constexpr Features kAvx2 = 1 << 0;
constexpr Features kFma = 1 << 1;
constexpr Features kF16c = 1 << 2;
constexpr Features kAvxVnni = 1 << 3;
constexpr Features kAvx512f = 1 << 4;
constexpr Features kAvx512bw = 1 << 5;
constexpr Features kAvx512dq = 1 << 6;
constexpr Features kAvx512vl = 1 << 7;
constexpr Features kAvx512vnni = 1 << 8;
constexpr Features kAvx512vbmi = 1 << 9;
constexpr Features kAvx512bf16 = 1 << 10;
constexpr Features kNeon = 1 << 16;
constexpr Features kDotprod = 1 << 17;
constexpr Features kI8mm = 1 << 18;
// No feature of any processor: lower_isa alone gives it, to instruction sets that are for tests.
constexpr Features kOnRequest = 1u << 31;

// What several sets share.
constexpr Features kHaswell = kAvx2 | kFma | kF16c;
constexpr Features kSkylake = kHaswell | kAvx512f | kAvx512bw | kAvx512dq | kAvx512vl;

struct Row {
  Isa isa;
  const char* name;
  Features features;
};

// In the order of the enumeration.
constexpr Row kIsas[] = {
    {Isa::scalar, "scalar", 0},
    {Isa::avx2, "avx2", kHaswell},
    {Isa::avx2vnni, "avx2vnni", kHaswell | kAvxVnni},
    {Isa::avx2vnni_evex, "avx2vnni_evex",
     kHaswell | kAvx512f | kAvx512vl | kAvx512vnni | kOnRequest},
    {Isa::avx512, "avx512", kSkylake},
    {Isa::avx512vnni, "avx512vnni", kSkylake | kAvx512vnni},
    {Isa::avx512vbmi, "avx512vbmi", kSkylake | kAvx512vnni | kAvx512vbmi},
    {Isa::avx512bf16, "avx512bf16", kSkylake | kAvx512bf16},
    {Isa::neon, "neon", kNeon},
    {Isa::dotprod, "dotprod", kNeon | kDotprod},
    {Isa::i8mm, "i8mm", kNeon | kDotprod | kI8mm},
};

constexpr const Row& row(Isa isa) { return kIsas[static_cast<int>(isa)]; }

constexpr bool in_order() {
  for (const Row& entry : kIsas)
    if (&row(entry.isa) != &entry) return false;
  return true;
}
static_assert(in_order());

Features detect() {
  Features found = 0;
  [[maybe_unused]] const auto add = [&found](Features feature, unsigned long supported) {
    if (supported) found |= feature;
  };
#if defined(TRINE_X86)
  __builtin_cpu_init();  // reads XCR0 too: a feature counts only if the system saves its registers
  add(kAvx2, __builtin_cpu_supports("avx2"));
  add(kFma, __builtin_cpu_supports("fma"));
  add(kAvx512f, __builtin_cpu_supports("avx512f"));
  add(kAvx512bw, __builtin_cpu_supports("avx512bw"));
  add(kAvx512dq, __builtin_cpu_supports("avx512dq"));
  add(kAvx512vl, __builtin_cpu_supports("avx512vl"));
  add(kAvx512vnni, __builtin_cpu_supports("avx512vnni"));
  add(kAvx512vbmi, __builtin_cpu_supports("avx512vbmi"));
  add(kAvx512bf16, __builtin_cpu_supports("avx512bf16"));
  // clang knows no names for these. They have the registers of AVX2.
  unsigned eax = 0, ebx, ecx = 0, edx;
  if ((found & kAvx2) && __get_cpuid(1, &eax, &ebx, &ecx, &edx)) add(kF16c, ecx & (1u << 29));
  if ((found & kAvx2) && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx))
    add(kAvxVnni, eax & (1u << 4));
#elif defined(TRINE_ARM64)
  add(kNeon, true);  // every 64-bit Arm that runs an operating system has it
#if defined(__linux__)
  add(kDotprod, getauxval(AT_HWCAP) & HWCAP_ASIMDDP);
  add(kI8mm, getauxval(AT_HWCAP2) & HWCAP2_I8MM);
#endif
#endif
  return found;
}

Features supported() {
  static const Features found = detect();
  return found;
}

std::atomic<Features>& enabled() {
  static std::atomic<Features> features{supported()};
  return features;
}

bool includes(Features features, Isa isa) { return (row(isa).features & ~features) == 0; }

}  // namespace

const std::vector<Isa>& all_isas() {
  static const std::vector<Isa> isas = [] {
    std::vector<Isa> all;
    for (const Row& entry : kIsas) all.push_back(entry.isa);
    return all;
  }();
  return isas;
}

const char* isa_name(Isa isa) { return row(isa).name; }
bool isa_for_tests(Isa isa) { return row(isa).features & kOnRequest; }
bool isa_supported(Isa isa) { return includes(supported() | kOnRequest, isa); }
bool isa_enabled(Isa isa) { return includes(enabled().load(std::memory_order_relaxed), isa); }

Isa highest_isa() {
  Isa highest = Isa::scalar;
  for (Isa isa : all_isas())
    if (isa_enabled(isa)) highest = isa;
  return highest;
}

uint32_t lower_isa(Isa isa) {
  if (!isa_supported(isa))
    throw std::invalid_argument(std::string("this processor cannot run ") + isa_name(isa) +
                                " kernels; trine.backends.cpu_isas() lists what it can run");
  return enabled().exchange(row(isa).features);
}

void restore_isas(uint32_t before) { enabled() = before & (supported() | kOnRequest); }

}  // namespace trine
