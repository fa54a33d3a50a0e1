// The registered functions, by the names of their ops.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <any>
#include <map>
#include <string>

namespace torch::stable {

inline std::map<std::string, std::any>& registered() {
  static std::map<std::string, std::any> functions;
  return functions;
}

// Throws std::bad_any_cast where the registered function has another type.
template <class Function>
Function* registered_as(const std::string& name) {
  return std::any_cast<Function*>(registered().at(name));
}

struct Library {
  void def(const char*) {}
  template <class Function>
  void impl(const char* name, Function* function) {
    registered()[name] = function;
  }
};

inline bool run_registration(void (*body)(Library&)) {
  Library library;
  body(library);
  return true;
}

}  // namespace torch::stable

#define TORCH_BOX(function) function
#define STABLE_TORCH_LIBRARY_FRAGMENT(space, m) TRINE_REGISTRATION(space##_fragment, m)
#define STABLE_TORCH_LIBRARY_IMPL(space, device, m) TRINE_REGISTRATION(space##_##device, m)
#define TRINE_REGISTRATION(name, m)                       \
  static void register_##name(torch::stable::Library& m); \
  [[maybe_unused]] static const bool registered_##name =  \
      torch::stable::run_registration(&register_##name);  \
  static void register_##name([[maybe_unused]] torch::stable::Library& m)
