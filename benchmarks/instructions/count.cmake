# The program that `python -m benchmarks.run instructions` runs under valgrind.
add_executable(count_instructions EXCLUDE_FROM_ALL ${TRINE_SOURCES} benchmarks/instructions/main.cpp
               tests/sanitize/calls.cpp tests/without_torch/memory.cpp)
target_include_directories(count_instructions PRIVATE tests/without_torch tests/sanitize tests csrc)
target_compile_options(count_instructions PRIVATE ${TRINE_CXX_FLAGS} -g1)
target_compile_definitions(count_instructions PRIVATE
                           $<$<BOOL:${TRINE_PROCESSOR}>:TRINE_${TRINE_PROCESSOR}>)
