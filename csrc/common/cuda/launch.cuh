// Starts a kernel on a stream.
#pragma once

#include <stdexcept>
#include <string>

#include "common/cuda/device.cuh"

namespace trine {

// How many threads, and what each block gets.
struct LaunchShape {
  int64_t blocks;
  int threads;            // of a block
  int dynamic_bytes = 0;  // of shared memory, see TRINE_DYNAMIC_SHARED
  int cluster = 1;        // blocks of a cluster (sm_90); divides `blocks`
};

// Throws std::runtime_error if the kernel cannot start. What goes wrong while it runs shows at the
// next synchronisation, as for every CUDA kernel: waiting here would stall the device.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), const LaunchShape& shape,
            cudaStream_t stream, const Arguments&... arguments) {
  if (shape.blocks > INT32_MAX)  // what a grid holds in x; the cast below would drop the rest
    throw std::runtime_error(std::string(op) + ": too many rows for one CUDA grid");
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<unsigned>(shape.blocks);
  config.blockDim = static_cast<unsigned>(shape.threads);
  config.dynamicSmemBytes = static_cast<size_t>(shape.dynamic_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  cudaError_t error = cudaSuccess;
  // What a block gets without asking for more.
  constexpr int kDefaultDynamicBytes = 48 << 10;
  if (shape.dynamic_bytes > kDefaultDynamicBytes)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 shape.dynamic_bytes);
  if (error == cudaSuccess)
    error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (error != cudaSuccess) {
    cudaGetLastError();  // said here: the next launch of somebody else must not find it again
    throw std::runtime_error(std::string(op) +
                             ": the CUDA kernel did not start: " + cudaGetErrorString(error));
  }
}

// Facts of the current device that a launch depends on.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// What a block may get, its arrays and those of the launch; a multiprocessor has 1 KB more, and of
// each block it keeps 1 KB for itself.
inline int most_shared_bytes() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// 80 for sm_80, 90 for sm_90.
inline int compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}

}  // namespace trine
