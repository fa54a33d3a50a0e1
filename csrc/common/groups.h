// Groups of consecutive columns, each with a scale of its own.
#pragma once

#include <cstdint>

#include "common/check.h"

namespace trine {

inline constexpr int64_t kGroupMultiple = 64;  // what a group's columns are a multiple of

// The size of each of `groups` groups in a row of k columns.
inline int64_t check_groups(const char* op, int64_t groups, int64_t k) {
  check(groups > 0 && k > 0 && k % groups == 0 && k / groups % kGroupMultiple == 0, op,
        ": weight_scale has ", groups, " groups per row, which must cut K = ", k,
        " into groups of a multiple of ", kGroupMultiple, " values");
  return k / groups;
}

}  // namespace trine
