#include "common/scratch.h"

namespace trine {

std::atomic<bool> poison_scratch{false};

}  // namespace trine
