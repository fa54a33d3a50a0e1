// Runs operators on inputs from a file, for check_operators.py. Linked with ../without_torch in
// place of torch, so that it can be built for any processor and emulated.
//
//   operators                   prints the instruction sets that the processor has, then the kernel
//                               of each op, one to a line
//   operators ISA INPUT OUTPUT  forces ISA, makes every call in INPUT, writes the results
//
// A call is the name of an op, the number of threads, tensors, numbers and strings; see read_call.
// What is counted is an int64.
#include <torch/csrc/stable/library.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/scratch.h"

using torch::headeronly::ScalarType;
using torch::stable::registered_as;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

namespace {

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "%s\n", message.c_str());
  std::exit(1);
}

class File {
 public:
  File(const char* name, const char* mode) : file_(std::fopen(name, mode)) {
    if (file_ == nullptr) fail(std::string("cannot open ") + name);
  }
  ~File() {
    if (std::fclose(file_) != 0) fail("cannot write the results");
  }

  bool at_end() {
    const int next = std::getc(file_);
    std::ungetc(next, file_);
    return next == EOF;
  }
  void read(void* to, int64_t bytes) {
    if (bytes > 0 && std::fread(to, static_cast<size_t>(bytes), 1, file_) != 1)
      fail("the input ends within a call");
  }
  void write(const void* from, int64_t bytes) {
    if (bytes > 0 && std::fwrite(from, static_cast<size_t>(bytes), 1, file_) != 1)
      fail("cannot write the results");
  }
  template <class T>
  T read() {
    T value;
    read(&value, sizeof value);
    return value;
  }
  int64_t count() { return read<int64_t>(); }

 private:
  std::FILE* file_;
};

struct Call {
  std::string op;
  std::vector<Optional> tensors;
  std::vector<double> numbers;
  std::vector<std::string> strings;

  const Tensor& tensor(size_t i) const { return tensors.at(i).value(); }
};

std::string read_string(File& input) {
  std::string text(static_cast<size_t>(input.count()), ' ');
  input.read(text.data(), static_cast<int64_t>(text.size()));
  return text;
}

// Its type (-1: there is none), sizes, strides, and all bytes that the strides reach.
Optional read_tensor(File& input) {
  const int64_t type = input.count();
  if (type < 0) return std::nullopt;
  Tensor::Sizes sizes(static_cast<size_t>(input.count())), strides(sizes.size());
  for (int64_t& size : sizes) size = input.count();
  for (int64_t& stride : strides) stride = input.count();
  Tensor tensor(sizes, strides, static_cast<ScalarType>(type));
  input.read(tensor.mutable_data_ptr(), input.count());
  return tensor;
}

Call read_call(File& input) {
  Call call{read_string(input), {}, {}, {}};
  torch::stable::threads = static_cast<uint32_t>(input.count());
  for (int64_t left = input.count(); left > 0; --left) call.tensors.push_back(read_tensor(input));
  for (int64_t left = input.count(); left > 0; --left) call.numbers.push_back(input.read<double>());
  for (int64_t left = input.count(); left > 0; --left) call.strings.push_back(read_string(input));
  return call;
}

std::vector<Tensor> run(const Call& call) {
  if (call.op == "quantize_rows") {
    const auto [q, scale, sum] = registered_as<std::tuple<Tensor, Tensor, Tensor>(const Tensor&)>(
        "quantize_rows")(call.tensor(0));
    return {q, scale, sum};
  }
  if (call.op == "rms_norm_quantize_rows") {
    const auto [q, scale, sum] =
        registered_as<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Optional&, double)>(
            call.op)(call.tensor(0), call.tensors.at(1), call.numbers.at(0));
    return {q, scale, sum};
  }
  if (call.op == "layer_norm_quantize_rows") {
    const auto [q, scale, sum] = registered_as<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, const Optional&, const Optional&, double)>(call.op)(
        call.tensor(0), call.tensors.at(1), call.tensors.at(2), call.numbers.at(0));
    return {q, scale, sum};
  }
  if (call.op == "int8_linear_rows" || call.op == "ternary_linear_rows")
    return {registered_as<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                 const Tensor&, const Optional&, ScalarType, int64_t)>(call.op)(
        call.tensor(0), call.tensor(1), call.tensor(2), call.tensor(3), call.tensor(4),
        call.tensors.at(5), static_cast<ScalarType>(int(call.numbers.at(0))),
        int64_t(call.numbers.at(1)))};
  if (call.op == "int8_linear")
    return {registered_as<Tensor(const Tensor&, const Tensor&, const Tensor&, const Optional&,
                                 int64_t, const Optional&, const Optional&)>("int8_linear")(
        call.tensor(0), call.tensor(1), call.tensor(2), call.tensors.at(3),
        int64_t(call.numbers.at(0)), call.tensors.at(4), call.tensors.at(5))};
  if (call.op == "int8_embedding")
    return {registered_as<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, ScalarType)>(
        "int8_embedding")(call.tensor(0), call.tensor(1), call.tensor(2),
                          static_cast<int64_t>(call.numbers.at(0)),
                          static_cast<ScalarType>(int(call.numbers.at(1))))};
  if (call.op == "int8_conv2d") {
    const auto number = [&](size_t i) { return static_cast<int64_t>(call.numbers.at(i)); };
    const auto pair = [&](size_t i) { return std::vector<int64_t>{number(i), number(i + 1)}; };
    using Sizes = const std::vector<int64_t>&;
    return {
        registered_as<Tensor(const Tensor&, const Tensor&, const Tensor&, const Optional&, Sizes,
                             Sizes, Sizes, int64_t, bool, const Optional&, const Optional&)>(
            "int8_conv2d")(call.tensor(0), call.tensor(1), call.tensor(2), call.tensors.at(3),
                           pair(0), pair(2), pair(4), number(6), number(7) != 0, call.tensors.at(4),
                           call.tensors.at(5))};
  }
  if (call.op == "ternary_linear")
    return {registered_as<Tensor(const Tensor&, const Tensor&, const Tensor&, const Optional&,
                                 int64_t)>(call.op)(call.tensor(0), call.tensor(1), call.tensor(2),
                                                    call.tensors.at(3),
                                                    int64_t(call.numbers.at(0)))};
  if (call.op == "ternary24_linear" || call.op == "int8_weight_linear")
    return {registered_as<Tensor(const Tensor&, const Tensor&, const Tensor&, const Optional&)>(
        call.op)(call.tensor(0), call.tensor(1), call.tensor(2), call.tensors.at(3))};
  if (call.op == "sparse24_linear")
    return {registered_as<Tensor(const Tensor&, const Tensor&, const Tensor&, const Optional&,
                                 const Optional&)>("sparse24_linear")(
        call.tensor(0), call.tensor(1), call.tensor(2), call.tensors.at(3), call.tensors.at(4))};
  if (call.op == "softmax_kl") {  // both terms of each row, and the gradients
    const Tensor &of_soft = call.tensor(0), &of_hard = call.tensor(1), &student = call.tensor(2),
                 &teacher = call.tensor(3);
    const Optional &indices = call.tensors.at(4), &labels = call.tensors.at(5);
    const auto number = [&](size_t i) { return call.numbers.at(i); };
    const double temperature = number(0), beta = number(1), smoothing = number(2);
    const double scale = number(3), cap = number(4);
    const int64_t classes = student.size(student.dim() - 1);
    const std::string& divergence = call.strings.at(0);
    const auto [soft, hard, saved] = registered_as<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, Optional, Optional, Optional, Optional, double, std::string,
        double, double, int64_t, double, double, double, double, bool)>("softmax_kl")(
        student, teacher, indices, labels, {}, {}, temperature, divergence, beta, smoothing,
        classes, scale, cap, scale, cap, false);
    std::vector results{soft, hard};
    for (const bool for_teacher : {false, true})
      if (!(indices && for_teacher))
        results.push_back(registered_as<Tensor(
                              const Tensor&, const Tensor&, const Tensor&, const Tensor&, Optional,
                              Optional, Optional, Optional, double, std::string, double, double,
                              int64_t, double, double, double, double, bool, const Tensor&, bool)>(
            "softmax_kl_backward")(of_soft, of_hard, student, teacher, indices, labels, {}, {},
                                   temperature, divergence, beta, smoothing, classes, scale, cap,
                                   scale, cap, false, saved, for_teacher));
    const auto together = registered_as<std::tuple<Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, Optional, Optional, Optional, Optional, double, std::string,
        double, double, int64_t, double, double, double, double, bool, const Tensor&,
        const Tensor&)>("softmax_kl_with_gradient")(
        student, teacher, indices, labels, {}, {}, temperature, divergence, beta, smoothing,
        classes, scale, cap, scale, cap, false, of_soft, of_hard);
    const Tensor &gradient = std::get<2>(together), &expected = results[2];
    if (std::memcmp(gradient.const_data_ptr(), expected.const_data_ptr(),
                    std::size_t(expected.numel() * expected.element_size())) != 0)
      fail("softmax_kl_with_gradient gives another gradient than softmax_kl_backward");
    return results;
  }
  fail("no op is named " + call.op);
}

void print_what_runs() {
  for (const trine::Isa isa : trine::all_isas())
    if (trine::isa_supported(isa)) std::printf("%s ", trine::isa_name(isa));
  std::printf("\n");
  for (const auto& [op, isas] : trine::announced_kernels())
    for (const trine::Isa isa : isas)
      if (trine::isa_enabled(isa)) {
        std::printf("%s: %s\n", op.c_str(), trine::isa_name(isa));
        break;
      }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 1) {
    print_what_runs();
    return 0;
  }
  if (argc != 4) fail("usage: operators [ISA INPUT OUTPUT]");
  for (const trine::Isa isa : trine::all_isas())
    if (std::string(trine::isa_name(isa)) == argv[1]) trine::lower_isa(isa);
  trine::poison_scratch = true;
  File input(argv[2], "rb"), output(argv[3], "wb");
  while (!input.at_end()) {
    const std::vector<Tensor> results = run(read_call(input));
    const auto count = static_cast<int64_t>(results.size());
    output.write(&count, sizeof count);
    for (const Tensor& tensor : results) {
      const int64_t bytes = tensor.numel() * tensor.element_size();
      output.write(&bytes, sizeof bytes);
      output.write(tensor.const_data_ptr(), bytes);
    }
  }
}
