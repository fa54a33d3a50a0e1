#include <cstring>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/dispatch.h"
#include "softmax_kl/problem.h"
#include "softmax_kl/sums.h"

namespace trine {
namespace {

struct Kernel {
  Isa needs;
  const SoftmaxKlFunctions* functions;
};
constexpr Kernel kKernels[] = {
#if defined(TRINE_X86)
    {Isa::avx512, &kSoftmaxKlAvx512},
    {Isa::avx2, &kSoftmaxKlAvx2},
#elif defined(TRINE_ARM64)
    {Isa::neon, &kSoftmaxKlNeon},
#endif
    {Isa::scalar, &kSoftmaxKlScalar},
};
[[maybe_unused]] const bool announced = announce(kOp, kKernels);

constexpr float kLog2e = float(std::numbers::log2e);
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Row of the saved tensor.
struct Saved {
  SoftmaxKlRow soft;
  // Of the student's softmax at T = 1; NaN: a row without a cross entropy.
  float max, inverse_sum;
  // Of the classes that are in no bin.
  float tail_max, tail_sum;
};
constexpr int64_t kSavedColumns = sizeof(Saved) / sizeof(float);

// What is known of a part of a row.
struct PartSums {
  SoftmaxKlSums soft;
  SoftmaxSums hard, tail;
  double smoothed, weights;  // sum of weight * (z - hard.max) and of the weights
};

struct Part {
  int64_t row, begin, size;
};

// Computes on parts of rows, in memory of its own; one for each piece of work.
class Worker {
 public:
  Worker(const Problem& problem, const SoftmaxKlFunctions& kernel)
      : problem_(problem),
        kernel_(kernel),
        bins_(problem.slots ? problem.slots->count + 1 : 0),
        memory_((3 * problem.part_size() + 3 * bins_) * int64_t(sizeof(float))) {}

  PartSums forward(const Part& part) const {
    PartSums sums{};
    const LogitRow s = see(problem_.student, part, 0);
    if (problem_.labels) {
      sums.hard = kernel_.sum_softmax(s, part.size, kLog2e);
      if (problem_.smoothing != 0) {
        const WeightedSum weighted =
            kernel_.sum_weighted(s, part.size, weights_of(part), origin(sums.hard.max));
        sums.smoothed = weighted.logits;
        sums.weights = weighted.weights;
      }
    }
    if (problem_.slots) {
      sums.tail = kernel_.sum_softmax(tail_of(part), part.size, problem_.rate);
    } else {
      const LogitRow t = see(problem_.teacher, part, 1);
      sums.soft = problem_.reversed ? kernel_.forward(t, s, part.size, problem_.rate)
                                    : kernel_.forward(s, t, part.size, problem_.rate);
    }
    return sums;
  }

  SoftmaxKlSlopes slopes(const Part& part, const SoftmaxKlRow& row) const {
    return slopes(see(problem_.student, part, 0), see(problem_.teacher, part, 1), part.size, row);
  }

  // The soft loss of a row whose bins are known.
  float forward_bins(int64_t row, Saved* saved) const {
    fill_bins(row, *saved);
    const auto [s, t] = bin_rows();
    const FinishedRow finished =
        finish(problem_.reversed ? kernel_.forward(t, s, bins_, problem_.rate)
                                 : kernel_.forward(s, t, bins_, problem_.rate),
               problem_.rate);
    saved->soft = finished.row;
    if (problem_.divergence.kind == Divergence::kullback_leibler) return finished.kl;
    return finish(slopes(s, t, bins_, finished.row), &saved->soft);
  }

  float hard(int64_t row, const PartSums& sums, Saved* saved) const {
    const int64_t label = problem_.label(row);
    float z;
    kernel_.see(problem_.student.at(row, label), 1, problem_.student.seen, &z);
    saved->max = sums.hard.max;
    saved->inverse_sum = sums.hard.max == -kInfinity ? kNan : float(1 / sums.hard.sum);
    if (std::isnan(saved->inverse_sum)) return kNan;
    const double log_sum = std::log(sums.hard.sum), max = sums.hard.max;
    double loss = (1 - problem_.smoothing) * problem_.weight(label) * (log_sum - (double(z) - max));
    if (problem_.smoothing != 0)
      loss +=
          problem_.smoothing / double(problem_.classes) * (sums.weights * log_sum - sums.smoothed);
    return float(loss);
  }

  // Writes the gradient of soft_scale * T * soft + hard_scale * hard at a part's logits.
  void gradient(const Part& part, const Saved& saved, float soft_scale, float hard_scale,
                double sum_of_weights, bool for_teacher, void* out) const {
    const Logits& logits = for_teacher ? problem_.teacher : problem_.student;
    const FloatType type = logits.rows.type;
    const int64_t n = part.size;
    if (soft_scale == 0 && hard_scale == 0)  // what is masked out keeps its NaN in the loss
      return void(std::memset(out, 0, static_cast<std::size_t>(n * bytes_of(type))));
    if (is_nan(soft_scale, saved.soft.log2_ratio) || is_nan(hard_scale, saved.inverse_sum))
      return fill_with_nan(type, out, n);
    if (hard_scale == 0 && !logits.seen.changes() && !problem_.slots)
      return soft_gradient(see(problem_.student, part, 0), see(problem_.teacher, part, 1), n, saved,
                           soft_scale, for_teacher, out);

    const bool in_place = type == FloatType::float32 && !logits.seen.changes();
    float* sum = in_place ? static_cast<float*>(out) : buffer(2);
    const LogitRow z = widened(logits, part, for_teacher ? 1 : 0);
    if (soft_scale == 0 || problem_.slots)
      std::fill(sum, sum + n, 0.0f);
    else
      soft_gradient(for_teacher ? see(problem_.student, part, 0) : z,
                    for_teacher ? z : see(problem_.teacher, part, 1), n, saved, soft_scale,
                    for_teacher, sum);
    if (hard_scale != 0) add_hard(part, z, saved, hard_scale, sum_of_weights, sum);
    if (problem_.slots && soft_scale != 0) add_bins(part, saved, soft_scale, sum);
    if (!in_place) kernel_.see_backward(logits.at(part.row, part.begin), n, logits.seen, sum, out);
  }

 private:
  static bool is_nan(float scale, float of_row) {
    return std::isnan(scale) || (scale != 0 && std::isnan(of_row));
  }
  static float origin(float max) { return max == -kInfinity ? 0.0f : max; }

  static void fill_with_nan(FloatType type, void* to, int64_t count) {
    const auto fill = [&]<class T>(T* values) {
      T nan;
      narrow(kNan, &nan);
      std::fill(values, values + count, nan);
    };
    switch (type) {
      case FloatType::float32:
        return fill(static_cast<float*>(to));
      case FloatType::bfloat16:
        return fill(static_cast<bfloat16*>(to));
      case FloatType::float16:
        return fill(static_cast<float16*>(to));
    }
  }

  float* buffer(int i) const { return memory_.data<float>() + i * problem_.part_size(); }
  const float* weights_of(const Part& part) const {
    return problem_.class_weight ? problem_.weights() + part.begin : nullptr;
  }

  // A part's logits as they are seen, where they lie or in a buffer.
  LogitRow see(const Logits& logits, const Part& part, int i) const {
    return logits.seen.changes() ? to_buffer(logits, part, i) : logits.at(part.row, part.begin);
  }
  LogitRow widened(const Logits& logits, const Part& part, int i) const {
    return logits.rows.type == FloatType::float32 ? see(logits, part, i)
                                                  : to_buffer(logits, part, i);
  }
  LogitRow to_buffer(const Logits& logits, const Part& part, int i) const {
    kernel_.see(logits.at(part.row, part.begin), part.size, logits.seen, buffer(i));
    return {buffer(i), FloatType::float32};
  }

  SoftmaxKlSlopes slopes(LogitRow s, LogitRow t, int64_t n, const SoftmaxKlRow& row) const {
    if (problem_.reversed) std::swap(s, t);
    return kernel_.slopes(s, t, n, problem_.rate, row, problem_.divergence);
  }
  void soft_gradient(LogitRow s, LogitRow t, int64_t n, const Saved& saved, float scale,
                     bool for_teacher, void* out) const {
    if (problem_.reversed) std::swap(s, t);
    const auto run =
        for_teacher != problem_.reversed ? kernel_.teacher_gradient : kernel_.student_gradient;
    run(s, t, n, problem_.rate, saved.soft, problem_.divergence, scale, out);
  }

  void add_hard(const Part& part, LogitRow z, const Saved& saved, float scale,
                double sum_of_weights, float* sum) const {
    const int64_t label = problem_.label(part.row);
    const double of_label = scale * (1 - problem_.smoothing) * problem_.weight(label);
    const double of_each = scale * problem_.smoothing / double(problem_.classes);
    kernel_.add_softmax(z, part.size, kLog2e, saved.max,
                        float((of_label + of_each * sum_of_weights) * saved.inverse_sum),
                        weights_of(part), float(of_each), sum);
    if (label >= part.begin && label < part.begin + part.size)
      sum[label - part.begin] -= float(of_label);
  }

  // The part's logits without those of the bins.
  LogitRow tail_of(const Part& part) const {
    const LogitRow z = to_buffer(problem_.student, part, 1);
    for (int64_t j = 0; j < problem_.slots->count; ++j) {
      const int64_t at = problem_.slots->at(part.row, j) - part.begin;
      if (at >= 0 && at < part.size) buffer(1)[at] = -kInfinity;
    }
    return z;
  }

  float* student_bins() const { return buffer(3); }
  float* teacher_bins() const { return student_bins() + bins_; }
  std::pair<LogitRow, LogitRow> bin_rows() const {
    return {{student_bins(), FloatType::float32}, {teacher_bins(), FloatType::float32}};
  }

  // The logits of a row's bins, the tail's last; the student's relative to the largest.
  void fill_bins(int64_t row, const Saved& saved) const {
    float *s = student_bins(), *t = teacher_bins(), origin = saved.tail_max;
    const int64_t k = problem_.slots->count;
    int64_t used = 0;
    double known = 0;
    kernel_.see(problem_.teacher.at(row, 0), k, problem_.teacher.seen, t);
    for (int64_t j = 0; j < k; ++j) {
      const int64_t at = problem_.slots->at(row, j);
      s[j] = -kInfinity;
      if (at < 0) {
        t[j] = -kInfinity;
        continue;
      }
      kernel_.see(problem_.student.at(row, at), 1, problem_.student.seen, &s[j]);
      origin = std::max(origin, s[j]);
      known += std::exp(t[j] / problem_.temperature);
      ++used;
    }
    for (int64_t j = 0; j < k; ++j) s[j] -= origin;
    const double tail = saved.tail_sum;
    s[k] = float(double(saved.tail_max) - origin + problem_.temperature * std::log(tail));
    // What rounding leaves of a tail is none; fp32 knows 1 to 2^-23.
    constexpr double kLeast = 0x1p-23;
    t[k] = used == problem_.classes
               ? -kInfinity
               : float(problem_.temperature * std::log(std::max(1 - known, kLeast)));
  }

  void add_bins(const Part& part, const Saved& saved, float scale, float* sum) const {
    fill_bins(part.row, saved);
    const auto [s, t] = bin_rows();
    float* of_bins = teacher_bins() + bins_;
    soft_gradient(s, t, bins_, saved, scale, false, of_bins);
    const int64_t k = bins_ - 1;
    if (saved.tail_max != -kInfinity)
      kernel_.add_softmax(tail_of(part), part.size, problem_.rate, saved.tail_max,
                          of_bins[k] / saved.tail_sum, nullptr, 0.0f, sum);
    for (int64_t j = 0; j < k; ++j) {
      const int64_t at = problem_.slots->at(part.row, j) - part.begin;
      if (at >= 0 && at < part.size) sum[at] += of_bins[j];
    }
  }

  const Problem& problem_;
  const SoftmaxKlFunctions& kernel_;
  int64_t bins_;
  Scratch memory_;  // logits of both models, a gradient, the bins' logits and gradient
};

// Calls run(worker, i, part) for part i of those of rows begin to end - 1 that count.
template <class Run>
void for_each_part(const Problem& problem, const SoftmaxKlFunctions& kernel, int64_t begin,
                   int64_t end, const Run& run) {
  constexpr int64_t kWorthAThread = 1 << 14;  // elements: 10 us or so
  if (problem.classes == 0) return;
  const int64_t n = problem.classes, parts = problem.parts(), size = problem.part_size();
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / n);
  torch::stable::parallel_for(begin * parts, end * parts, grain, [&](int64_t first, int64_t last) {
    const Worker worker(problem, kernel);
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / parts, from = i % parts * size;
      if (!problem.skips(row)) run(worker, i, Part{row, from, std::min(size, n - from)});
    }
  });
}

// A large tensor is fresh memory every time, and its page faults cost several times the arithmetic:
// filling 131 MB took 70 ms in pages of 4 KB and 13 in pages of 2 MB.
void advise_huge_pages([[maybe_unused]] char* memory, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 1 << 21;
  constexpr int64_t kWorthACall = 4 << 20;
  if (bytes < kWorthACall) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), end = begin + uintptr_t(bytes);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  // Advice only: where it is refused everything still works.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Rows that are taken together, so that a second pass over them reads from L3; few enough for what
// is kept of each to be small (1 MB).
int64_t rows_at_a_time(const Problem& problem) {
  const int64_t bytes =
      problem.divergence.kind == Divergence::kullback_leibler ? 64 << 20 : 8 << 20;
  const int64_t row_bytes = problem.classes * 2 * int64_t(sizeof(float));
  const int64_t rows = std::min<int64_t>(bytes / std::max<int64_t>(1, row_bytes) + 1, 1 << 13);
  return std::min(rows, problem.rows());
}

// A row's parts, in their order.
PartSums merged(const PartSums* of_parts, int64_t parts, const Problem& problem) {
  PartSums row = of_parts[0];
  for (int64_t j = 1; j < parts; ++j) {
    const PartSums& part = of_parts[j];
    if (!problem.slots) merge(&row.soft, part.soft, problem.rate);
    merge(&row.hard, part.hard, kLog2e);
    merge(&row.tail, part.tail, problem.rate);
  }
  // Each part's logits were summed from its own maximum on.
  row.smoothed = row.weights = 0;
  for (int64_t j = 0; j < parts && problem.smoothing != 0; ++j) {
    const PartSums& part = of_parts[j];
    const double up = part.hard.max == -kInfinity ? 0.0 : double(part.hard.max) - row.hard.max;
    row.smoothed += part.smoothed + part.weights * up;
    row.weights += part.weights;
  }
  return row;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Arguments& arguments) {
  const Problem problem = read(arguments);
  const SoftmaxKlFunctions& kernel = *select(kKernels).functions;
  const int64_t m = problem.rows(), parts = problem.parts(), step = rows_at_a_time(problem);
  Tensor soft = new_tensor(arguments.student, {m}, ScalarType::Float);
  Tensor hard = new_tensor(arguments.student, {problem.labels ? m : 0}, ScalarType::Float);
  Tensor saved = new_tensor(arguments.student, {m, kSavedColumns}, ScalarType::Float);
  auto* softs = static_cast<float*>(soft.mutable_data_ptr());
  auto* hards = static_cast<float*>(hard.mutable_data_ptr());
  auto* rows = static_cast<Saved*>(saved.mutable_data_ptr());
  // Stays where rows are skipped or empty.
  std::fill(rows, rows + m, Saved{});
  std::fill(softs, softs + m, 0.0f);
  std::fill(hards, hards + (problem.labels ? m : 0), 0.0f);
  if (parts == 0) return {soft, hard, saved};

  const bool again = problem.divergence.kind != Divergence::kullback_leibler && !problem.slots;
  const Scratch of_parts(step * parts * int64_t(sizeof(PartSums)));
  const Scratch slopes_of_parts((again ? step * parts : 0) * int64_t(sizeof(SoftmaxKlSlopes)));
  auto* sums = of_parts.data<PartSums>();
  auto* slopes = slopes_of_parts.data<SoftmaxKlSlopes>();
  const auto for_rows = [&](int64_t begin, int64_t end, const auto& run) {
    torch::stable::parallel_for(begin, end, 1024, [&](int64_t first, int64_t last) {
      const Worker worker(problem, kernel);
      for (int64_t i = first; i < last; ++i)
        if (!problem.skips(i)) run(worker, i);
    });
  };
  for (int64_t begin = 0; begin < m; begin += step) {
    const int64_t end = std::min(begin + step, m);
    for_each_part(problem, kernel, begin, end,
                  [&](const Worker& worker, int64_t i, const Part& part) {
                    sums[i - begin * parts] = worker.forward(part);
                  });
    for_rows(begin, end, [&](const Worker& worker, int64_t i) {
      const PartSums row = merged(sums + (i - begin) * parts, parts, problem);
      if (problem.labels) hards[i] = worker.hard(i, row, &rows[i]);
      if (problem.slots) {
        rows[i].tail_max = row.tail.max;
        rows[i].tail_sum = float(row.tail.sum);
        softs[i] = worker.forward_bins(i, &rows[i]);
      } else {
        const FinishedRow finished = finish(row.soft, problem.rate);
        rows[i].soft = finished.row;
        softs[i] = finished.kl;
      }
    });
    if (!again) continue;
    for_each_part(problem, kernel, begin, end,
                  [&](const Worker& worker, int64_t i, const Part& part) {
                    slopes[i - begin * parts] = worker.slopes(part, rows[part.row].soft);
                  });
    for_rows(begin, end, [&](const Worker&, int64_t i) {
      SoftmaxKlSlopes row{};
      for (int64_t j = 0; j < parts; ++j) add(&row, slopes[(i - begin) * parts + j]);
      softs[i] = finish(row, &rows[i].soft);
    });
  }
  return {soft, hard, saved};
}

Tensor backward(const Tensor& grad_soft, const Tensor& grad_hard, const Arguments& arguments,
                const Tensor& saved, bool for_teacher) {
  const Problem problem = read(arguments);
  check(!(for_teacher && problem.slots), kOp,
        ": a teacher known by some classes alone gets no gradient");
  const SoftmaxKlFunctions& kernel = *select(kKernels).functions;
  const int64_t m = problem.rows();
  const auto of_rows = [&](const Tensor& gradient, int64_t count, const char* name) {
    check_dtype(gradient, ScalarType::Float, "float32", kOp, name);
    check(gradient.numel() == count, kOp, ": ", name, " has ", gradient.numel(),
          " values; it must have as many as the loss, ", count);
    return as_contiguous(gradient);
  };
  const Tensor of_soft = of_rows(grad_soft, m, "the soft loss's gradient");
  const Tensor of_hard = of_rows(grad_hard, problem.labels ? m : 0, "the cross entropy's gradient");
  check(saved.scalar_type() == ScalarType::Float && saved.dim() == 2 && saved.size(0) == m &&
            saved.size(1) == kSavedColumns && saved.is_contiguous(),
        kOp, ": the saved rows must be as the forward op returned them");
  const auto* softs = static_cast<const float*>(of_soft.const_data_ptr());
  const auto* hards = static_cast<const float*>(of_hard.const_data_ptr());
  const auto* rows = static_cast<const Saved*>(saved.const_data_ptr());
  double sum_of_weights = 0;
  for (int64_t j = 0; problem.labels && j < problem.classes; ++j)
    sum_of_weights += problem.weight(j);

  const Tensor& logits = for_teacher ? arguments.teacher : arguments.student;
  const Matrix& matrix = (for_teacher ? problem.teacher : problem.student).rows;
  Tensor gradient =
      new_tensor(logits, std::vector<int64_t>(logits.sizes().begin(), logits.sizes().end()));
  auto* out = static_cast<char*>(gradient.mutable_data_ptr());
  const int64_t element = bytes_of(matrix.type), row_bytes = matrix.k * element;
  advise_huge_pages(out, m * row_bytes);
  for (int64_t i = 0; i < m; ++i) {
    const int64_t written = problem.skips(i) ? 0 : problem.classes * element;
    std::memset(out + i * row_bytes + written, 0, static_cast<std::size_t>(row_bytes - written));
  }
  for_each_part(problem, kernel, 0, m, [&](const Worker& worker, int64_t, const Part& part) {
    const bool has_hard = problem.labels && !for_teacher;
    worker.gradient(part, rows[part.row], float(softs[part.row] / problem.temperature),
                    has_hard ? hards[part.row] : 0.0f, sum_of_weights, for_teacher,
                    out + part.row * row_bytes + part.begin * element);
  });
  return gradient;
}

std::tuple<Tensor, Tensor, Tensor> softmax_kl_cpu(
    const Tensor& student, const Tensor& teacher, Optional slots, Optional labels,
    Optional class_weight, Optional row_mask, double temperature, std::string divergence,
    double beta, double smoothing, int64_t classes, double student_scale, double student_cap,
    double teacher_scale, double teacher_cap, bool teacher_is_log) {
  return forward({student, teacher, slots, labels, class_weight, row_mask, temperature, divergence,
                  beta, smoothing, classes, student_scale, student_cap, teacher_scale, teacher_cap,
                  teacher_is_log});
}

Tensor softmax_kl_backward_cpu(const Tensor& grad_soft, const Tensor& grad_hard,
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

#define TRINE_SOFTMAX_KL_ARGUMENTS                                                          \
  "Tensor student_logits, Tensor teacher, Tensor? teacher_indices, Tensor? labels, "        \
  "Tensor? class_weight, Tensor? row_mask, float temperature, str divergence, float beta, " \
  "float label_smoothing, int classes, float student_scale, float student_cap, "            \
  "float teacher_scale, float teacher_cap, bool teacher_is_log"

STABLE_TORCH_LIBRARY_FRAGMENT(trine, m) {
  // No defaults: the public call has them. Compiled graphs that torch caches on disk leave out
  // arguments that equal a default, and would be taken for those of a version without them.
  m.def("softmax_kl(" TRINE_SOFTMAX_KL_ARGUMENTS ") -> (Tensor soft, Tensor hard, Tensor saved)");
  m.def("softmax_kl_backward(Tensor grad_soft, Tensor grad_hard, " TRINE_SOFTMAX_KL_ARGUMENTS
        ", Tensor saved, bool for_teacher) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(trine, CPU, m) {
  m.impl("softmax_kl", TORCH_BOX(&trine::softmax_kl_cpu));
  m.impl("softmax_kl_backward", TORCH_BOX(&trine::softmax_kl_backward_cpu));
}
