# Programs that run every op without torch, under sanitizers; tests/sanitize/main.cpp says what they
# do. Built and run by `make sanitize`.
enable_testing()
set(PROGRAM tests/sanitize/main.cpp tests/sanitize/calls.cpp tests/without_torch/memory.cpp)
set(FLAGS_address -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all)
# Checks as calls: gcc compiles the kernels in two thirds of the time that it takes for checks in line.
if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)
  list(APPEND FLAGS_address --param=asan-instrumentation-with-call-threshold=0)
endif()
set(FLAGS_thread -fsanitize=thread -include ${CMAKE_CURRENT_LIST_DIR}/masked_stores.h)

foreach(kind IN ITEMS address thread)
  set(sources ${TRINE_SOURCES} ${PROGRAM})
  if(kind STREQUAL address)
    list(TRANSFORM sources REPLACE ".*/common/scratch.cpp$" tests/sanitize/scratch.cpp)
  endif()
  add_library(ops_${kind} OBJECT ${sources})
  target_include_directories(ops_${kind} PRIVATE tests/without_torch csrc)
  target_compile_options(ops_${kind} PRIVATE ${TRINE_CXX_FLAGS} ${FLAGS_${kind}} -O1 -g1)
  target_compile_definitions(ops_${kind} PRIVATE $<$<BOOL:${TRINE_PROCESSOR}>:TRINE_${TRINE_PROCESSOR}>)
  target_link_options(ops_${kind} INTERFACE ${FLAGS_${kind}})
  add_executable(sanitize_${kind})
  target_link_libraries(sanitize_${kind} ops_${kind})
  add_test(NAME ${kind} COMMAND sanitize_${kind})
  add_test(NAME ${kind}_planted COMMAND sanitize_${kind} --planted)
  # Nobody reads these reports, and naming their lines takes most of the time.
  set_tests_properties(${kind}_planted PROPERTIES
                       ENVIRONMENT "ASAN_OPTIONS=symbolize=0;TSAN_OPTIONS=symbolize=0")
endforeach()
