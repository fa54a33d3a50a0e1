// The Python module: instruction-set control and build facts. Loading it loads libtrine, and that
// registers the operators with torch; none is bound here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ceilings/ceilings.h"
#include "common/dispatch.h"
#include "common/isa.h"
#include "common/scratch.h"

namespace py = pybind11;

namespace {

trine::Isa isa_of(const std::string& name) {
  for (trine::Isa isa : trine::all_isas())
    if (name == trine::isa_name(isa)) return isa;
  throw py::value_error("unknown instruction set '" + name +
                        "'; trine.backends.cpu_isas() lists those that run here");
}

std::vector<std::string> supported_isas(bool for_tests) {
  std::vector<std::string> names;
  for (trine::Isa isa : trine::all_isas())
    if (trine::isa_supported(isa) && trine::isa_for_tests(isa) == for_tests)
      names.emplace_back(trine::isa_name(isa));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("version") = TRINE_VERSION;
  m.attr("compiler") = __VERSION__;
  // How the build decided about libtrine_cuda, as a sentence, and its kernels as "op/file op/file".
  m.attr("cuda_build") = TRINE_CUDA_BUILD;
  m.attr("cuda_kernels") = TRINE_CUDA_KERNELS;

  m.def("isas", [] { return supported_isas(false); });
  m.def("test_isas", [] { return supported_isas(true); });
  m.def("enabled_isa", [] { return std::string(trine::isa_name(trine::highest_isa())); });
  m.def("lower_isa", [](const std::string& name) { return trine::lower_isa(isa_of(name)); });
  m.def("restore_isas", &trine::restore_isas);

  m.def("poison_scratch", [](bool poison) { trine::poison_scratch = poison; });

  // Op name to the instruction sets it has kernels for, fastest first. Those for tests are among
  // them only while they are in force.
  m.def("kernels", [] {
    std::map<std::string, std::vector<std::string>> table;
    for (const auto& [op, isas] : trine::announced_kernels())
      for (trine::Isa isa : isas)
        if (!trine::isa_for_tests(isa) || trine::isa_enabled(isa))
          table[op].emplace_back(trine::isa_name(isa));
    return table;
  });
  m.def("kernel_in_force", [](const std::string& op) {
    for (const auto& entry : trine::announced_kernels())
      if (entry.op == op)
        for (trine::Isa isa : entry.isas)
          if (trine::isa_enabled(isa)) return std::string(trine::isa_name(isa));
    throw py::value_error("no op named '" + op + "'");
  });

  // One thread's ceilings (see ceilings/ceilings.h); the caller takes the time. They run without
  // the interpreter lock, so that several Python threads can measure together.
  m.def(
      "read_memory",
      [](uintptr_t address, int64_t bytes, int streams, int64_t ahead) {
        return trine::ceiling_kernel().read(reinterpret_cast<const void*>(address), bytes, streams,
                                            ahead);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "dot_int8", [](int64_t repeats) { return trine::ceiling_kernel().dot_int8(repeats); },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "fma_fp32", [](int64_t repeats) { return trine::ceiling_kernel().fma_fp32(repeats); },
      py::call_guard<py::gil_scoped_release>());
  m.def("ceiling_ops", [] {
    const auto& kernel = trine::ceiling_kernel();
    return std::pair(kernel.dot_int8_ops, kernel.fma_fp32_ops);
  });
}
