#include "common/dispatch.h"

namespace trine {

std::vector<OpKernels>& announced_kernels() {
  static std::vector<OpKernels> tables;
  return tables;
}

}  // namespace trine
