// Runs softmax_kl_with_gradient_cuda, which is softmax_kl_cuda and softmax_kl_backward_cuda or both
// in one pass, on the case on standard input; then backward for the teacher. The arguments are the
// schedule's seed and the compute capability.
//
// A case: the numbers that main reads, in its order (floats as their bits; 0 bytes: a tensor that
// is not there), then the tensors in the order of their buffers. The answer: soft, hard, the
// gradient of each side that has a width, the student's scaled by softmax_kl_scale_cuda.
#include "softmax_kl/cuda.h"

#include <cstdlib>
#include <memory>
#include <vector>

#include "common/cuda/launch.cuh"
#include "driver.h"
#include "emulator.h"

namespace {

using cuda_on_cpu::GuardedBuffer, cuda_on_cpu::read_number;

float read_float() { return trine::from_bits(uint32_t(read_number())); }

// The buffers of a case; what is absent is null.
class Buffers {
 public:
  template <class T>
  T* add(const char* name, std::size_t alignment, int64_t bytes) {
    if (bytes == 0) return nullptr;
    inputs_.push_back(std::make_unique<GuardedBuffer>(name, bytes, alignment));
    return inputs_.back()->data<T>();
  }
  void read() {
    for (const auto& input : inputs_) input->read();
  }

 private:
  std::vector<std::unique_ptr<GuardedBuffer>> inputs_;
};

trine::LogitsOnDevice read_logits(const char* name, Buffers& buffers) {
  trine::LogitsOnDevice logits;
  logits.type = static_cast<trine::FloatType>(read_number());
  logits.row_bytes = read_number();
  logits.rate = read_float();
  logits.slope = read_float();
  const int64_t alignment = read_number();
  logits.data = buffers.add<char>(name, alignment, read_number());
  return logits;
}

}  // namespace

int main(int, char** arguments) {
  trine::emulated_capability = std::atoi(arguments[2]);
  cuda_on_cpu::set_seed(std::strtoull(arguments[1], nullptr, 10));
  Buffers buffers;
  trine::SoftmaxKlOnDevice problem = {};
  const int64_t rows = problem.rows = read_number();
  problem.classes = int(read_number());
  problem.reversed = read_number() != 0;
  problem.divergence.kind = static_cast<trine::Divergence::Kind>(read_number());
  problem.divergence.beta = read_float();
  problem.first = read_logits("the first logits", buffers);
  problem.second = read_logits("the second logits", buffers);
  problem.row_mask = buffers.add<bool>("the mask", 1, read_number());
  problem.hard.labels = buffers.add<int64_t>("the labels", 8, read_number());
  problem.hard.class_weight = buffers.add<float>("the class weights", 4, read_number());
  problem.hard.smoothing = read_float();
  problem.hard.rate = read_float();
  problem.top_k.given = read_number() != 0;
  problem.top_k.count = int(read_number());
  problem.top_k.wide = read_number() != 0;
  problem.top_k.indices = buffers.add<void>("the indices", 4, read_number());
  const auto* grad_soft = buffers.add<float>("grad_soft", 4, rows * 4);
  const auto* grad_hard = buffers.add<float>("grad_hard", 4, rows * 4);
  struct {
    int64_t width, alignment;
  } sides[2];  // student, teacher
  for (auto& side : sides) side = {read_number(), read_number()};
  const auto* factor = buffers.add<float>("the factor", 4, 4);
  buffers.read();

  const bool has_labels = problem.hard.labels != nullptr;
  GuardedBuffer soft("soft", rows * 4, 4), hard("hard", has_labels ? rows * 4 : 0, 4);
  GuardedBuffer saved("saved", rows * sizeof(trine::SavedRow), 4);
  const auto type_of = [&](bool for_teacher) {
    return (for_teacher == problem.reversed ? problem.first : problem.second).type;
  };
  const auto bytes = [&](bool for_teacher) {
    return rows * sides[for_teacher].width * trine::kFloatBytes[int(type_of(for_teacher))];
  };
  GuardedBuffer of_student("the student's gradient", bytes(false), sides[0].alignment);
  GuardedBuffer of_teacher("the teacher's gradient", bytes(true), sides[1].alignment);
  const auto gradient = [&](bool for_teacher) -> trine::GradientOnDevice {
    return {grad_soft, grad_hard, for_teacher, (for_teacher ? of_teacher : of_student).data<void>(),
            sides[for_teacher].width};
  };
  trine::softmax_kl_with_gradient_cuda(problem, soft.data<float>(), hard.data<float>(),
                                       saved.data<trine::SavedRow>(), gradient(false), nullptr);
  soft.write();
  hard.write();
  saved.check_not_overrun();
  trine::softmax_kl_scale_cuda(of_student.data<void>(), type_of(false), rows, sides[0].width,
                               factor, nullptr);
  of_student.write();
  if (sides[1].width == 0) return 0;
  trine::softmax_kl_backward_cuda(problem, saved.data<trine::SavedRow>(), gradient(true), nullptr);
  of_teacher.write();
}
