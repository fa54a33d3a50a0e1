// Twin of csrc/common/cuda/launch.cuh: the kernel has run when it returns.
#pragma once

#include "common/cuda/device.cuh"
#include "common/cuda/stream.h"

namespace trine {

struct LaunchShape {
  int64_t blocks;
  int threads;
  int dynamic_bytes = 0;
  int cluster = 1;
};

template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t,
            const Arguments&... arguments) {
  cuda_on_cpu::run_grid({{static_cast<unsigned>(shape.blocks), 1, 1},
                         {static_cast<unsigned>(shape.threads), 1, 1},
                         static_cast<std::size_t>(shape.dynamic_bytes),
                         static_cast<unsigned>(shape.cluster)},
                        [&] { kernel(arguments...); });
}

// Few, so that small problems reach every case: fewer tiles than blocks, and several for each; odd,
// so that clusters leave one out.
inline int multiprocessors() { return 5; }

// So few that rows of some thousand classes need a cluster, and longer ones do not fit.
inline int most_shared_bytes() { return 40 << 10; }

inline int emulated_capability = 80;
inline int compute_capability() { return emulated_capability; }

}  // namespace trine
