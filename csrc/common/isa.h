// Which x86 instruction sets the CPU kernels may use.
//
// An instruction set is a set of CPU features, not a rung of a ladder: each names what it needs
// and which others it includes. Lowering exists for tests and benchmarks.
#pragma once

#include <string>
#include <vector>

#define TRINE_API __attribute__((visibility("default")))

namespace trine {

enum class Isa {
  scalar,      // portable C++
  avx2,        // AVX2, FMA, F16C (Haswell, Zen)
  avx512,      // AVX-512 F, BW, DQ, VL (Skylake-SP, Zen 4)
  avx512vnni,  // the same and VNNI's vpdpbusd on 512-bit registers (Cascade Lake, Zen 4)
};

TRINE_API const std::vector<Isa>& all_isas();  // in the order of the enumeration
TRINE_API const char* isa_name(Isa isa);
TRINE_API bool isa_supported(Isa isa);  // this processor and operating system can run it
TRINE_API bool isa_enabled(Isa isa);    // supported, and not switched off by lower_isa

// Lets kernels use `isa` and what it includes, and nothing else. Throws std::invalid_argument
// where the processor lacks it.
TRINE_API void lower_isa(Isa isa);
TRINE_API void restore_isa();  // everything that is supported
TRINE_API Isa highest_isa();   // the last enabled one

}  // namespace trine
