# The pybind11 of the running interpreter, as the target `pybind11_by_path`.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import pybind11; print(pybind11.get_include())"
  OUTPUT_VARIABLE PYBIND11_INCLUDE RESULT_VARIABLE pybind11_missing ERROR_QUIET
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(pybind11_missing)
  message(FATAL_ERROR "trine's build needs pybind11: pip install pybind11")
endif()
add_library(pybind11_by_path INTERFACE)
target_include_directories(pybind11_by_path SYSTEM INTERFACE ${PYBIND11_INCLUDE})
