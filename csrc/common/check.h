// Errors that reach Python as a ValueError with one clear sentence.
//
// Not STD_TORCH_CHECK: it puts the function and the source path in front of the message.
#pragma once

#include <sstream>
#include <stdexcept>

namespace trine {

// Throws std::invalid_argument with the concatenated `message` unless `condition` holds.
template <class... Message>
void check(bool condition, const Message&... message) {
  if (condition) [[likely]]
    return;
  std::ostringstream text;
  (text << ... << message);
  throw std::invalid_argument(text.str());
}

}  // namespace trine
