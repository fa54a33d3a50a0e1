// count OP VARIANT M N K ISA: one call of an op without torch, for callgrind to count.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "common/isa.h"
#include "sanitize/calls.h"

namespace {

using namespace sanitize;

const Op& op_named(const char* name) {
  for (const Op& op : kOps)
    if (op.name == name) return op;
  std::fprintf(stderr, "there is no op %s\n", name);
  std::exit(2);
}

void lower_isa(const char* name) {
  for (const trine::Isa isa : trine::all_isas())
    if (!std::strcmp(name, trine::isa_name(isa))) trine::lower_isa(isa);
}

}  // namespace

// What callgrind's --toggle-collect names: quantisation, kernels and all between them.
extern "C" __attribute__((noinline)) void counted(const Call& call) { call(); }

int main(int count, char** arguments) {
  if (count != 7) return 2;
  const auto number = [&](int at) { return std::strtoll(arguments[at], nullptr, 10); };
  lower_isa(arguments[6]);
  const Shape shape{number(3), number(4), number(5)};
  const int variant = int(number(2));
  const Call call = op_named(arguments[1]).make(shape, ScalarType::Float, variant, Values::random);
  call();  // what happens once only: static tables, the first allocations
  counted(call);
}
