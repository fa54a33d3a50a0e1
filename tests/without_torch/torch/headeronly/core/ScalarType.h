#pragma once

namespace torch::headeronly {

enum class ScalarType { Byte, Char, Int, Half, Float, BFloat16, Long, Bool };

inline const char* toString(ScalarType type) {
  constexpr const char* kNames[] = {"Byte",  "Char",     "Int",  "Half",
                                    "Float", "BFloat16", "Long", "Bool"};
  return kNames[static_cast<int>(type)];
}

}  // namespace torch::headeronly
