#include "common/float_types.h"

namespace trine {
namespace {

// Declared before the loop that calls it: a float has no namespace to be looked up in.
template <class T>
void store_floats(float value, T* y, int64_t) {
  narrow(value, y);
}

}  // namespace
}  // namespace trine

#include "int8_embedding/row.h"

namespace trine {
namespace {

struct One {
  static constexpr int64_t kLanes = 1;

  static float all(float value) { return value; }
  static float load_codes(const int8_t* p) { return *p; }
  static float multiply(float a, float b) { return a * b; }
};

}  // namespace

void int8_embedding_scalar(const int8_t* codes, float scale, int64_t dim, FloatType type, void* y) {
  embed_row<One>(codes, scale, dim, type, y);
}

}  // namespace trine
