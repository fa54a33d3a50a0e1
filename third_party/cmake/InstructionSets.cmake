# A source's instruction set is its file name; nothing else sets -m flags. Builds for another
# processor leave it out.
#
# Targets made of kernel files call compile_for_instruction_sets(target).
get_filename_component(TRINE_CSRC ${CMAKE_CURRENT_LIST_DIR}/../../csrc ABSOLUTE)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(TRINE_PROCESSOR X86)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64|ARM64")
  set(TRINE_PROCESSOR ARM64)
endif()

# Multiplications and additions are never contracted: every instruction set, CUDA and the
# reference must round in the same places.
set(TRINE_CXX_FLAGS -Wall -Wextra -ffp-contract=off)

function(compile_for processor isa)
  file(GLOB matched CONFIGURE_DEPENDS ${TRINE_CSRC}/*/${isa}.cpp)
  if(processor STREQUAL TRINE_PROCESSOR)
    set_source_files_properties(${matched} PROPERTIES COMPILE_OPTIONS "${ARGN}")
    set_property(GLOBAL APPEND PROPERTY TRINE_ISAS ${isa})
  else()
    set_source_files_properties(${matched} PROPERTIES HEADER_FILE_ONLY ON)
  endif()
endfunction()

set(AVX2 -mavx2 -mfma -mf16c)
# gcc 12 warns about uninitialised values inside its own AVX-512 headers.
set(AVX512 ${AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
           $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>
           $<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized>)
compile_for(X86 avx2 ${AVX2})
compile_for(X86 avx2vnni ${AVX2} -mavxvnni)
compile_for(X86 avx2vnni_evex ${AVX2} -mavx512f -mavx512vl -mavx512vnni)
compile_for(X86 avx512 ${AVX512})
compile_for(X86 avx512vnni ${AVX512} -mavx512vnni)
compile_for(X86 avx512vbmi ${AVX512} -mavx512vnni -mavx512vbmi)
compile_for(X86 avx512bf16 ${AVX512} -mavx512bf16)

compile_for(ARM64 neon -march=armv8-a)
compile_for(ARM64 dotprod -march=armv8.2-a+dotprod)
compile_for(ARM64 i8mm -march=armv8.2-a+dotprod+i8mm)

set(TRINE_CHECK_ISA_OBJECTS ${CMAKE_CURRENT_LIST_DIR}/CheckIsaObjects.cmake)
function(compile_for_instruction_sets target)
  target_compile_definitions(${target} PRIVATE
    $<$<BOOL:${TRINE_PROCESSOR}>:TRINE_${TRINE_PROCESSOR}>)
  get_property(isas GLOBAL PROPERTY TRINE_ISAS)
  add_custom_command(TARGET ${target} PRE_LINK VERBATIM COMMAND ${CMAKE_COMMAND} -DNM=${CMAKE_NM}
    -DOBJDUMP=${CMAKE_OBJDUMP} "-DOBJECTS=$<TARGET_OBJECTS:${target}>" "-DISAS=${isas}" -P ${TRINE_CHECK_ISA_OBJECTS})
endfunction()
