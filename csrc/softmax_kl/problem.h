// The arguments of softmax_kl, checked: what torch.cpp computes with.
#pragma once

#include <cmath>
#include <limits>
#include <numbers>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "common/torch_linear.h"
#include "softmax_kl/softmax_kl.h"

namespace trine {
namespace {

constexpr const char* kOp = "softmax_kl";
using Optional = std::optional<Tensor>;

inline int64_t bytes_of(FloatType type) { return kFloatBytes[static_cast<int>(type)]; }

// One model's rows of logits.
struct Logits {
  Matrix rows;
  LogitsSeen seen;

  LogitRow at(int64_t row, int64_t begin) const {
    return {static_cast<const char*>(rows.row(row)) + begin * bytes_of(rows.type), rows.type};
  }
};

// The bins of a teacher that is known by some classes alone.
struct Slots {
  Tensor owner;
  int64_t count = 0;
  bool wide = false;  // int64, or int32

  explicit operator bool() const { return count > 0; }
  // The class of a slot; -1: unused.
  int64_t at(int64_t row, int64_t slot) const {
    const int64_t i = row * count + slot;
    return wide ? static_cast<const int64_t*>(owner.const_data_ptr())[i]
                : static_cast<const int32_t*>(owner.const_data_ptr())[i];
  }
};

struct Part {
  int64_t row, begin, size;
};

struct Problem {
  Logits student, teacher;
  int64_t classes;
  double temperature;
  float rate;  // log2(e) / T
  Divergence divergence = {};
  bool reversed = false;  // for the kernels student and teacher are exchanged
  std::optional<Slots> slots = {};
  std::optional<Tensor> labels = {}, class_weight = {}, row_mask = {};
  double smoothing = 0;

  int64_t rows() const { return student.rows.m; }
  // Whether the divergence takes slopes; of a teacher known by some classes those of its bins do.
  bool has_slopes() const { return divergence.kind != Divergence::kullback_leibler && !slots; }
  bool skips(int64_t row) const {
    return row_mask && !static_cast<const bool*>(row_mask->const_data_ptr())[row];
  }
  int64_t label(int64_t row) const {
    return static_cast<const int64_t*>(labels->const_data_ptr())[row];
  }
  const float* weights() const {
    return class_weight ? static_cast<const float*>(class_weight->const_data_ptr()) : nullptr;
  }
  double weight(int64_t of_class) const { return class_weight ? weights()[of_class] : 1.0; }
  // A row is cut in the same places whatever the number of threads, and its parts are merged in
  // their order, so that the result does not depend on who computed them.
  int64_t parts() const { return (classes + kPart - 1) / kPart; }
  int64_t part_size() const {
    constexpr int64_t kAlign = 64;  // whole cache lines
    if (classes == 0) return 0;
    const int64_t even = (classes + parts() - 1) / parts();
    return (even + kAlign - 1) / kAlign * kAlign;
  }

  Part part(int64_t row, int64_t i) const {
    const int64_t begin = i * part_size();
    return {row, begin, std::min(part_size(), classes - begin)};
  }

  // Elements of a row that one call of a kernel takes at most. Few long rows thus feed many
  // threads, and what merging costs (0.1 us or so) is small beside them.
  static constexpr int64_t kPart = 1 << 14;
};

inline std::string shape_of(const Tensor& tensor) {
  std::string text;
  for (const int64_t size : tensor.sizes())
    text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

// A divergence, and whether it is the one with student and teacher exchanged.
inline std::pair<Divergence, bool> divergence_of(const std::string& name, double beta) {
  struct Named {
    const char* name;
    Divergence::Kind kind;
    bool reversed, takes_beta;
  };
  constexpr Named kNames[] = {
      {"forward_kl", Divergence::kullback_leibler, false, false},
      {"reverse_kl", Divergence::kullback_leibler, true, false},
      {"jsd", Divergence::jensen_shannon, false, true},
      {"skewed_forward_kl", Divergence::skewed_kl, false, true},
      {"skewed_reverse_kl", Divergence::skewed_kl, true, true},
      {"total_variation", Divergence::total_variation, false, false},
  };
  std::string names;
  for (const Named& entry : kNames) {
    if (name == entry.name) {
      check(!entry.takes_beta || (beta > 0 && beta < 1), kOp, ": beta of '", name,
            "' must lie between 0 and 1, it is ", beta,
            "; at the ends are 'forward_kl' and 'reverse_kl'");
      return {{entry.kind, float(beta)}, entry.reversed};
    }
    names += (names.empty() ? "'" : ", '") + std::string(entry.name) + "'";
  }
  check(false, kOp, ": divergence must be one of ", names, "; it is '", name, "'");
  return {};
}

// A contiguous copy of a vector whose length is `length`.
inline Optional vector_of(const Optional& tensor, ScalarType dtype, const char* dtype_name,
                          int64_t length, const char* name, const char* of_what) {
  if (!tensor) return {};
  check(tensor->scalar_type() == dtype, kOp, ": ", name, " must be ", dtype_name);
  check(tensor->numel() == length, kOp, ": ", name, " must have a value for each of the ", length,
        " ", of_what, "; its shape is ", shape_of(*tensor));
  return as_contiguous(*tensor);
}

inline void check_class(int64_t value, int64_t lowest, int64_t classes, const char* what,
                        int64_t row) {
  if (value >= lowest && value < classes) [[likely]]
    return;
  throw std::out_of_range(std::string(kOp) + ": " + what + " of row " + std::to_string(row) +
                          " is " + std::to_string(value) + "; it must lie in [0, " +
                          std::to_string(classes) + ")");
}

// All arguments of both operators but those of backward alone.
struct Arguments {
  const Tensor &student, &teacher;
  const Optional &slots, &labels, &class_weight, &row_mask;
  double temperature;
  const std::string& divergence;
  double beta, smoothing;
  int64_t classes;
  double student_scale, student_cap, teacher_scale, teacher_cap;
  bool teacher_is_log;
};

inline LogitsSeen seen(double scale, double cap, const char* whose) {
  check(scale > 0 && scale <= std::numeric_limits<float>::max(), kOp, ": the ", whose,
        "'s logit scale must be positive and finite, it is ", scale);
  check(cap >= 0 && cap <= std::numeric_limits<float>::max(), kOp, ": the ", whose,
        "'s soft-cap must be positive and finite, it is ", cap);
  return {float(scale), float(cap)};
}

inline Problem read(const Arguments& a) {
  // Before the dtypes: class labels in the teacher's place are better told by their shape.
  const int64_t dim = a.student.dim();
  const auto leading = [](const Tensor& t) { return t.sizes().end() - (t.dim() > 0 ? 1 : 0); };
  check(dim == a.teacher.dim() && std::equal(a.student.sizes().begin(), leading(a.student),
                                             a.teacher.sizes().begin(), leading(a.teacher)),
        kOp,
        ": student_logits and teacher_logits must have the same leading dimensions; they have ",
        shape_of(a.student), " and ", shape_of(a.teacher));
  const auto scale = a.teacher_is_log || a.slots ? a.temperature : a.teacher_scale;
  Problem problem{{as_matrix(a.student, kOp, "student_logits"), {}},
                  {as_matrix(a.teacher, kOp, "teacher_logits"), {}},
                  a.classes,
                  a.temperature,
                  float(std::numbers::log2e / a.temperature)};
  check(a.temperature > 0 && problem.rate > 0 && problem.rate <= std::numeric_limits<float>::max(),
        kOp, ": temperature must be positive and finite, it is ", a.temperature);
  problem.student.seen = seen(a.student_scale, a.student_cap, "student");
  problem.teacher.seen = seen(scale, a.teacher_cap, "teacher");
  std::tie(problem.divergence, problem.reversed) = divergence_of(a.divergence, a.beta);
  check(a.classes >= 0 && a.classes <= problem.student.rows.k &&
            (a.slots || a.classes <= problem.teacher.rows.k),
        kOp, ": there are ", a.classes, " classes, and logits of ", shape_of(a.student), " and ",
        shape_of(a.teacher));
  check(a.smoothing >= 0 && a.smoothing <= 1, kOp, ": label_smoothing must lie in [0, 1], it is ",
        a.smoothing);
  problem.smoothing = a.smoothing;
  const int64_t m = problem.rows();
  problem.row_mask = vector_of(a.row_mask, ScalarType::Bool, "bool", m, "row_mask", "rows");
  problem.labels = vector_of(a.labels, ScalarType::Long, "int64", m, "labels", "rows");
  problem.class_weight =
      vector_of(a.class_weight, ScalarType::Float, "float32", a.classes, "class_weight", "classes");
  if (a.slots) {
    const ScalarType type = a.slots->scalar_type();
    check(type == ScalarType::Long || type == ScalarType::Int, kOp,
          ": teacher_indices must be int64 or int32");
    check(std::equal(a.teacher.sizes().begin(), a.teacher.sizes().end(), a.slots->sizes().begin(),
                     a.slots->sizes().end()),
          kOp, ": teacher_indices must have the shape of the teacher's log-probabilities, ",
          shape_of(a.teacher), "; theirs is ", shape_of(*a.slots));
    problem.slots =
        Slots{as_contiguous(*a.slots), problem.teacher.rows.k, type == ScalarType::Long};
  }
  return problem;
}

// Also looks at the labels and indices, which lie in the host's memory.
[[maybe_unused]] inline Problem read_checked(const Arguments& a) {
  Problem problem = read(a);
  for (int64_t row = 0; row < problem.rows(); ++row) {
    if (problem.skips(row)) continue;
    if (problem.labels) check_class(problem.label(row), 0, a.classes, "the label", row);
    for (int64_t j = 0; problem.slots && j < problem.slots->count; ++j)
      check_class(problem.slots->at(row, j), -1, a.classes, "a teacher index", row);
  }
  return problem;
}

// What arrives at a result of `count` rows.
inline Tensor gradient_of_rows(const Tensor& gradient, int64_t count, const char* name) {
  check_dtype(gradient, ScalarType::Float, "float32", kOp, name);
  check(gradient.numel() == count, kOp, ": ", name, " has ", gradient.numel(),
        " values; it must have as many as the loss, ", count);
  return as_contiguous(gradient);
}

// The operators' arguments, one by one as torch passes them: what a device registers, of its own
// forward(Arguments) and backward.
using Results = std::tuple<Tensor, Tensor, Tensor>;

template <Results (*forward)(const Arguments&)>
Results softmax_kl_op(const Tensor& student, const Tensor& teacher, Optional slots, Optional labels,
                      Optional class_weight, Optional row_mask, double temperature,
                      std::string divergence, double beta, double smoothing, int64_t classes,
                      double student_scale, double student_cap, double teacher_scale,
                      double teacher_cap, bool teacher_is_log) {
  return forward({student, teacher, slots, labels, class_weight, row_mask, temperature, divergence,
                  beta, smoothing, classes, student_scale, student_cap, teacher_scale, teacher_cap,
                  teacher_is_log});
}

using ResultsWithGradient = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <ResultsWithGradient (*with_gradient)(const Arguments&, const Tensor&, const Tensor&)>
ResultsWithGradient softmax_kl_with_gradient_op(
    const Tensor& student, const Tensor& teacher, Optional slots, Optional labels,
    Optional class_weight, Optional row_mask, double temperature, std::string divergence,
    double beta, double smoothing, int64_t classes, double student_scale, double student_cap,
    double teacher_scale, double teacher_cap, bool teacher_is_log, const Tensor& soft_coefficient,
    const Tensor& hard_coefficient) {
  return with_gradient(
      {student, teacher, slots, labels, class_weight, row_mask, temperature, divergence, beta,
       smoothing, classes, student_scale, student_cap, teacher_scale, teacher_cap, teacher_is_log},
      soft_coefficient, hard_coefficient);
}

template <Tensor (*backward)(const Tensor&, const Tensor&, const Arguments&, const Tensor&, bool)>
Tensor softmax_kl_backward_op(const Tensor& grad_soft, const Tensor& grad_hard,
                              const Tensor& student, const Tensor& teacher, Optional slots,
                              Optional labels, Optional class_weight, Optional row_mask,
                              double temperature, std::string divergence, double beta,
                              double smoothing, int64_t classes, double student_scale,
                              double student_cap, double teacher_scale, double teacher_cap,
                              bool teacher_is_log, const Tensor& saved, bool for_teacher) {
  return backward(
      grad_soft, grad_hard,
      {student, teacher, slots, labels, class_weight, row_mask, temperature, divergence, beta,
       smoothing, classes, student_scale, student_cap, teacher_scale, teacher_cap, teacher_is_log},
      saved, for_teacher);
}

}  // namespace
}  // namespace trine
