// Picks the fastest kernel of an op that the enabled instruction sets can run.
//
// Each op's torch.cpp holds one table of kernels, fastest first, ending with the scalar one. A row
// is any struct with a member `Isa needs`. There is no central list: an op announces its table.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "common/isa.h"

namespace trine {

template <class Kernel, std::size_t n>
const Kernel& select(const Kernel (&kernels)[n]) {
  for (const Kernel& kernel : kernels)
    if (isa_enabled(kernel.needs)) return kernel;
  return kernels[n - 1];
}

// What trine.backends.describe() shows of an op: the instruction sets it has kernels for, fastest
// first.
struct OpKernels {
  std::string op;
  std::vector<Isa> isas;
};

TRINE_API std::vector<OpKernels>& announced_kernels();

template <class Kernel, std::size_t n>
bool announce(const char* op, const Kernel (&kernels)[n]) {
  OpKernels entry{op, {}};
  for (const Kernel& kernel : kernels) entry.isas.push_back(kernel.needs);
  announced_kernels().push_back(entry);
  return true;
}

}  // namespace trine
