#pragma once

namespace torch::headeronly {

enum class ScalarType { Byte, Char, Int, Half, Float, BFloat16 };

inline const char* toString(ScalarType type) {
  constexpr const char* kNames[] = {"Byte", "Char", "Int", "Half", "Float", "BFloat16"};
  return kNames[static_cast<int>(type)];
}

}  // namespace torch::headeronly
