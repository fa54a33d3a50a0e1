# Decides whether the CUDA library is built, by TRINE_CUDA:
#   AUTO  built where nvcc is found and works (whether a GPU is visible plays no role)
#   ON    an nvcc that is missing or unusable is an error
#   OFF   not built
# Sets TRINE_WITH_CUDA, and TRINE_CUDA_BUILD: what was decided and why, for backends.describe().
set(TRINE_CUDA AUTO CACHE STRING "Build the CUDA library: AUTO (where nvcc works), ON or OFF")
set_property(CACHE TRINE_CUDA PROPERTY STRINGS AUTO ON OFF)
if(NOT TRINE_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "TRINE_CUDA must be AUTO, ON or OFF; it is '${TRINE_CUDA}'.")
endif()

# The GPU targets of a source, by its file name. cuda.cu: code for sm_80 (A100 and, with fewer features in use, everything after it) and sm_90 (H100, H200),
# and PTX that the driver compiles for later GPUs; or, to try it where it is compiled, for one GPU.
set(TRINE_CUDA_ARCHITECTURE "" CACHE STRING
    "Compute capability of the one GPU to build for, 90 say; empty: every GPU from sm_80 on")
if(NOT TRINE_CUDA_ARCHITECTURE MATCHES "^([1-9][0-9]+)?$")
  message(FATAL_ERROR "TRINE_CUDA_ARCHITECTURE must be a compute capability without its dot, as 90; "
          "it is '${TRINE_CUDA_ARCHITECTURE}'.")
endif()
if(TRINE_CUDA_ARCHITECTURE)
  set(TRINE_CUDA_TARGETS_cuda
      -gencode=arch=compute_${TRINE_CUDA_ARCHITECTURE},code=sm_${TRINE_CUDA_ARCHITECTURE})
else()
  set(TRINE_CUDA_TARGETS_cuda -gencode=arch=compute_80,code=sm_80
      -gencode=arch=compute_90,code=sm_90 -gencode=arch=compute_90,code=compute_90)
endif()
# Instructions that exist on one generation only.
set(TRINE_CUDA_TARGETS_cuda_sm80 -gencode=arch=compute_80,code=sm_80)
set(TRINE_CUDA_TARGETS_cuda_sm90a -gencode=arch=compute_90a,code=sm_90a)

# Sets `problem` to why nvcc cannot be used, or to nothing. nvcc refuses host compilers that are
# newer than itself, which CMake's own check would report in fifty lines.
function(find_usable_nvcc problem)
  find_program(TRINE_NVCC nvcc HINTS $ENV{CUDACXX} $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin
               PATHS /usr/local/cuda/bin)
  if(NOT TRINE_NVCC)
    set(${problem} "no nvcc was found" PARENT_SCOPE)
    return()
  endif()
  set(trial ${CMAKE_CURRENT_BINARY_DIR}/nvcc_trial)
  file(WRITE ${trial}.cu "#include <concepts>\n#include <string>\n__global__ void trial() {}\n")
  execute_process(
    COMMAND ${TRINE_NVCC} -ccbin ${CMAKE_CXX_COMPILER} -std=c++20 ${TRINE_CUDA_TARGETS_cuda}
            -c ${trial}.cu -o ${trial}.o
    RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(failed)
    # The first line that says something, on one line.
    string(REGEX MATCH "[^\n]*(error|fatal|unsupported|not found|denied)[^\n]*" cause "${output}")
    if(NOT cause)
      set(cause "${failed}")  # what the system said where nvcc could not be started at all
    endif()
    # It goes into a string of the C++ module: nothing that CMake, the shell or C++ reads as syntax.
    string(REGEX REPLACE "[;\"\\\\#$`]+" "," cause "${cause}")
    set(${problem} "${TRINE_NVCC} cannot compile with ${CMAKE_CXX_COMPILER}: ${cause}" PARENT_SCOPE)
  else()
    set(${problem} "" PARENT_SCOPE)
  endif()
endfunction()

set(TRINE_WITH_CUDA OFF)
if(TRINE_CUDA STREQUAL "OFF")
  set(TRINE_CUDA_BUILD "not built: trine was built with TRINE_CUDA=OFF")
else()
  find_usable_nvcc(nvcc_problem)
  if(NOT nvcc_problem)
    set(TRINE_WITH_CUDA ON)
    set(CMAKE_CUDA_COMPILER ${TRINE_NVCC})
    set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
    set(CMAKE_CUDA_ARCHITECTURES OFF)  # each source names its own targets
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    set(CMAKE_CUDA_STANDARD 20)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    set(CMAKE_CUDA_EXTENSIONS OFF)
    set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
    enable_language(CUDA)
    set(TRINE_CUDA_BUILD "built with nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
    if(TRINE_CUDA_ARCHITECTURE)
      string(APPEND TRINE_CUDA_BUILD " for sm_${TRINE_CUDA_ARCHITECTURE} alone")
    endif()
  elseif(TRINE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "TRINE_CUDA=ON, but ${nvcc_problem}. Install a CUDA toolkit >= 12.0 that "
            "knows this C++ compiler, name its nvcc with -DTRINE_NVCC=<path>, or use "
            "TRINE_CUDA=OFF for the CPU alone.")
  else()
    set(TRINE_CUDA_BUILD "not built: ${nvcc_problem}")
    if(TRINE_NVCC)
      message(WARNING "The CUDA kernels are ${TRINE_CUDA_BUILD}. TRINE_CUDA=OFF builds for the CPU "
              "without this warning.")
    endif()
  endif()
endif()
message(STATUS "CUDA library: ${TRINE_CUDA_BUILD}")
