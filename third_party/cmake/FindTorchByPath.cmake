# The torch of the running interpreter, as the target `torch_by_path`.
#
# Not find_package(Torch): that demands a CUDA toolkit whenever the installed torch was built with
# one, even for a CPU-only extension, and overrides the CUDA architectures.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import torch; print(torch.__path__[0]); print(torch.__version__)"
  OUTPUT_VARIABLE torch_facts ERROR_VARIABLE torch_error RESULT_VARIABLE torch_missing
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(torch_missing)
  message(FATAL_ERROR
    "trine is built against the torch that is already installed, and ${Python_EXECUTABLE} cannot "
    "import it. Install torch >= 2.11 first, then run: pip install --no-build-isolation .\n"
    "${torch_error}")
endif()
string(REPLACE "\n" ";" torch_facts "${torch_facts}")
list(GET torch_facts 0 TORCH_DIR)
list(GET torch_facts 1 TORCH_VERSION)
if(TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "trine needs torch >= 2.11 (its stable C++ ABI); found ${TORCH_VERSION}.")
endif()

add_library(torch_by_path INTERFACE)
target_include_directories(torch_by_path SYSTEM INTERFACE ${TORCH_DIR}/include)
target_link_libraries(torch_by_path INTERFACE ${TORCH_DIR}/lib/libtorch_cpu.so ${TORCH_DIR}/lib/libc10.so)
# The stable ABI of torch 2.11: one binary serves that version and every later one.
target_compile_definitions(torch_by_path INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
message(STATUS "torch ${TORCH_VERSION} at ${TORCH_DIR}")
