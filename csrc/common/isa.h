// Which instruction sets the CPU kernels may use.
//
// An instruction set is a set of processor features, not a rung of a ladder: it includes every
// other whose features it has (the table in isa.cpp). Lowering exists for tests and benchmarks.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#define TRINE_API __attribute__((visibility("default")))

namespace trine {

// A source file of the same name holds an op's kernel for it.
enum class Isa {
  scalar,         // portable C++
  avx2,           // AVX2, FMA, F16C (Haswell, Zen)
  avx2vnni,       // the same and AVX-VNNI: vpdpbusd on 256-bit registers (Alder Lake, Zen 5)
  avx2vnni_evex,  // for tests alone: the sources of avx2vnni with AVX-512's encoding of vpdpbusd,
                  // which shows what they compute where the processor lacks AVX-VNNI
  avx512,         // AVX-512 F, BW, DQ, VL (Skylake-SP, Zen 4)
  avx512vnni,     // the same and VNNI's vpdpbusd on 512-bit registers (Cascade Lake, Zen 4)
  avx512vbmi,     // the same and VBMI's vpermb and vpmultishiftqb (Ice Lake, Zen 4)
  avx512bf16,     // avx512 and BF16's vdpbf16ps (Cooper Lake, Zen 4)
  neon,           // Advanced SIMD (every 64-bit Arm)
  dotprod,        // the same and sdot (Armv8.2: Neoverse N1, Cortex-A76, Apple M1)
  i8mm,           // the same and smmla (Armv8.6: Neoverse V1 and N2, Apple M2)
};

TRINE_API const std::vector<Isa>& all_isas();  // in the order of the enumeration
TRINE_API const char* isa_name(Isa isa);
TRINE_API bool isa_for_tests(Isa isa);  // used where lower_isa names it, and nowhere else
TRINE_API bool isa_supported(Isa isa);  // this processor and operating system can run it
TRINE_API bool isa_enabled(Isa isa);    // supported, and not switched off by lower_isa
TRINE_API Isa highest_isa();            // the last enabled one

// Lets kernels use `isa` and what it includes, and nothing else. Returns what they could use
// before, for restore_isas. Throws std::invalid_argument where the processor lacks `isa`.
TRINE_API uint32_t lower_isa(Isa isa);
TRINE_API void restore_isas(uint32_t before);

}  // namespace trine
