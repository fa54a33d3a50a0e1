# Fails the build if a kernel file's object holds a weak (inline, template) function.
#
# The linker keeps one copy of a weak function for the whole library. If that were the one compiled
# for AVX-512, every other caller would run it too, on processors that have no AVX-512.
# And if one for AVX2-VNNI does not hold vpdpbusd in the encoding of AVX-VNNI, or holds anything of
# AVX-512: tests run the same source in AVX-512's encoding where the processor has only that.
# Run as: cmake -DNM=... -DOBJDUMP=... -DISAS="avx2;avx512" -DOBJECTS="a.o;b.o" -P CheckIsaObjects.cmake
foreach(object IN LISTS OBJECTS)
  cmake_path(GET object FILENAME isa)
  string(REPLACE ".cpp.o" "" isa ${isa})
  if(NOT isa IN_LIST ISAS)
    continue()
  endif()
  execute_process(COMMAND ${NM} --demangle ${object} OUTPUT_VARIABLE symbols
                  COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[0-9a-f]+ [Wu] [^\n]*" weak "${symbols}")
  if(weak)
    list(JOIN weak "\n  " weak)
    message(FATAL_ERROR
      "${object} holds weak functions, compiled for its instruction set:\n  ${weak}\n"
      "Put them into an anonymous namespace, move them out of line, or build with optimisation.")
  endif()
  if(isa STREQUAL "avx2vnni")
    execute_process(COMMAND ${OBJDUMP} --disassemble ${object} OUTPUT_VARIABLE code
                    COMMAND_ERROR_IS_FATAL ANY)
    string(REGEX MATCH "[^\n]*([0-9a-f][ \t]+vpdpbusd|%zmm|%[xy]mm(1[6-9]|2[0-9]|3[01])|%k[0-7])[^\n]*" avx512 "${code}")
    if(avx512 OR NOT code MATCHES "{vex}[ \t]*vpdpbusd")
      message(FATAL_ERROR "${object} is not AVX-VNNI code: ${avx512}")
    endif()
  endif()
endforeach()
