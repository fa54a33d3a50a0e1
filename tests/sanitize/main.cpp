// Runs every op on every instruction set of this machine, for the sanitizers to watch.
//
//   sanitize            nothing may be reported
//   sanitize --planted  bugs are planted, each of which must be reported: in every op and on every
//                       instruction set a tensor that is one element short, and a sum beyond
//                       int32_t; or, where threads are watched, pieces that overlap
#include <sys/wait.h>
#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "calls.h"
#include "common/dispatch.h"
#include "common/isa.h"
#include "quantize_rows/quantize_rows.h"

// The sanitizers' own hooks: how a reported bug ends the process, told from everything else.
constexpr int kReported = 99;
#define HOOK extern "C" __attribute__((visibility("default")))
HOOK const char* __asan_default_options() { return "exitcode=99"; }
HOOK const char* __ubsan_default_options() { return "exitcode=99"; }
HOOK const char* __tsan_default_options() { return "exitcode=99:halt_on_error=1"; }

namespace {

using namespace sanitize;

#ifdef __SANITIZE_THREAD__
constexpr bool kForThreads = true;
#else
constexpr bool kForThreads = false;
#endif

constexpr ScalarType kFloatTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

// Around what kernels cut into: vectors, chunks of packed weights, tiles, blocks and slices.
constexpr Shape kShapes[] = {
    {1, 1, 1},     {1, 17, 100}, {2, 5, 15},    {3, 16, 16},   {5, 33, 63},
    {7, 31, 64},   {8, 48, 65},  {33, 20, 257}, {1, 70, 1000}, {4, 3, 1024},
    {0, 4, 32},    {4, 0, 32},   {4, 3, 0},     {13, 300, 40}, {70, 19, 72},
    {131, 37, 33}, {2, 9, 4200}, {17, 6, 4160}, {66, 258, 96}, {6, 4, 8256},
};

void fail(const std::string& message) {
  std::fprintf(stderr, "%s\n", message.c_str());
  std::exit(1);
}

bool same_bytes(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  for (std::size_t i = 0; i < a.size(); ++i)
    if (std::memcmp(a[i].const_data_ptr(), b[i].const_data_ptr(),
                    std::size_t(a[i].numel() * a[i].element_size())) != 0)
      return false;
  return true;
}

// Calls visit(op, call) for every call that there is to try.
template <class Visit>
void for_each_call(const Visit& visit) {
  for (const Op& op : kOps) {
    for (const Shape& shape : kShapes)
      for (const ScalarType type : kFloatTypes)
        for (int variant = 0; variant < op.variants; ++variant)
          visit(op, op.make(shape, type, variant, Values::random));
    for (int variant = 0; variant < op.variants; ++variant)
      visit(op, op.make({3, 70, 4160}, ScalarType::Float, variant, Values::impossible));
    if (!kForThreads)
      for (const auto& [variant, k] : op.longest)
        visit(op, op.make({1, 2, k}, ScalarType::BFloat16, variant, Values::extreme));
  }
}

// On others it would run the kernel of the next lower one again.
bool has_kernel(const std::string& op, trine::Isa isa) {
  for (const auto& [name, isas] : trine::announced_kernels())  // one table per kind of weight
    if (name.starts_with(op) && std::find(isas.begin(), isas.end(), isa) != isas.end()) return true;
  return false;
}

// Calls visit(name) with each instruction set that this machine and `op` have.
template <class Visit>
void for_each_isa(const std::string& op, const Visit& visit) {
  for (const trine::Isa isa : trine::all_isas())
    if (trine::isa_supported(isa) && has_kernel(op, isa)) {
      const uint32_t before = trine::lower_isa(isa);
      visit(std::string(trine::isa_name(isa)));
      trine::restore_isas(before);
    }
}

// The first calls of the process, side by side: whatever is initialised then, and whatever calls
// share. Instruction sets are switched meanwhile.
void run_side_by_side() {
  std::atomic<bool> done{false};
  std::thread switching([&] {
    while (!done)
      for_each_isa("int8_linear", [](const std::string&) { std::this_thread::yield(); });
  });
  for (const Op& op : kOps) {
    const Call call = op.make({19, 37, 192}, ScalarType::Float, 0, Values::random);
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; ++i)
      callers.emplace_back([&] {
        for (int repeat = 0; repeat < 20; ++repeat) call();
      });
    for (std::thread& caller : callers) caller.join();
  }
  done = true;
  switching.join();
}

void run_everything() {
  torch::stable::threads = 2;
  run_side_by_side();
  int calls = 0;
  for_each_call([&](const Op& op, const Call& call) {
    for_each_isa(op.name, [&](const std::string& isa) {
      torch::stable::threads = 1;
      const auto alone = call();
      torch::stable::threads = 3;
      if (!same_bytes(alone, call()))
        fail(op.name + ", " + isa + ": the result depends on the number of threads");
      calls += 2;
    });
  });
  std::printf("%d calls\n", calls);
}

// Whether a process that makes this call with this bug planted is stopped by the sanitizer.
template <class Plant>
bool is_reported(const Plant& run_planted) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    std::freopen("/dev/null", "w", stderr);
    run_planted();
    std::_Exit(0);
  }
  int status;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == kReported;
}

// Every tensor of the call, in turn, lacks its last element.
bool each_short_tensor_is_reported(const Op& op, const std::string& where, int variant) {
  // With whole chunks every byte of a packed weight counts.
  const auto make = [&] {
    return op.make({3, 37, 192}, ScalarType::Float, variant, Values::random);
  };
  torch::stable::tensors_made = 0;
  make()();
  const int tensors = torch::stable::tensors_made;
  bool all = true;
  for (int i = 0; i < tensors; ++i) {
    const bool reported = is_reported([&] {
      torch::stable::tensors_made = 0;
      torch::stable::short_tensor = i;
      make()();
    });
    if (!reported) std::fprintf(stderr, "%s: tensor %d short: not reported\n", where.c_str(), i);
    all &= reported;
  }
  return all;
}

// The scalar kernel sums up in int32_t, which holds one value of 127 less than this row has.
// (Vector instructions wrap around, which is theirs to do.)
bool signed_overflow_is_reported() {
  constexpr int64_t k = trine::kQuantizeRowsMaxK + 1;
  const std::vector<trine::bfloat16> ones(k, trine::bfloat16{0x3f80});
  std::vector<int8_t> q(k);
  float scale;
  int32_t sum;
  const auto run = [&](int64_t count) {
    return is_reported([&, count] {
      trine::quantize_row_scalar(ones.data(), trine::FloatType::bfloat16, count, q.data(), &scale,
                                 &sum);
    });
  };
  const bool reported = run(k) && !run(k - 1);
  if (!reported) std::fprintf(stderr, "a sum beyond int32_t: not reported\n");
  return reported;
}

bool overlap_is_reported(const Op& op, const std::string& where, int variant) {
  const Call call = op.make({64, 64, 192}, ScalarType::Float, variant, Values::random);
  const bool reported = is_reported([&] {
    torch::stable::threads = 2;
    torch::stable::plant_overlap = true;
    call();
  });
  if (!reported) std::fprintf(stderr, "%s: overlapping pieces: not reported\n", where.c_str());
  return reported;
}

void run_planted() {
  bool all = kForThreads || signed_overflow_is_reported();
  int calls = 0;
  for (const Op& op : kOps)
    for_each_isa(op.name, [&](const std::string& isa) {
      for (int variant = 0; variant < op.variants; ++variant) {
        const std::string where = op.name + " (" + std::to_string(variant) + "), " + isa;
        all &= kForThreads ? overlap_is_reported(op, where, variant)
                           : each_short_tensor_is_reported(op, where, variant);
        ++calls;
      }
    });
  if (!all) fail("planted bugs were not reported");
  std::printf("planted bugs in %d calls were reported\n", calls);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::strcmp(arguments[1], "--planted") == 0)
    run_planted();
  else
    run_everything();
}
