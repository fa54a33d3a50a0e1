// Starts a kernel on a stream.
#pragma once

#include <stdexcept>
#include <string>

#include "common/cuda/device.cuh"

namespace trine {

// Throws std::runtime_error if the kernel cannot start. What goes wrong while it runs shows at the
// next synchronisation, as for every CUDA kernel: waiting here would stall the device.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads,
            cudaStream_t stream, Arguments... arguments) {
  if (blocks > INT32_MAX)  // what a grid holds in x; the cast below would drop the rest
    throw std::runtime_error(std::string(op) + ": too many rows for one CUDA grid");
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(op) +
                             ": the CUDA kernel did not start: " + cudaGetErrorString(error));
}

}  // namespace trine
