// What every kernel's source includes, parsed once for all of them. Nothing of csrc: a planted bug
// must reach the compiler.

#include <algorithm>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>

#include "async_copies.h"
#include "driver.h"
#include "emulator.h"
#include "matrix_units.h"
#include "shared_memory.h"
