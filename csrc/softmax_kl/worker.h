// What softmax_kl does with a part of a row: the kernels that it takes, one after the other, while
// the part lies in L2, and the memory that lies between them.
#pragma once

#include <cstring>
#include <utility>

#include "softmax_kl/problem.h"
#include "softmax_kl/sums.h"

namespace trine {
namespace {

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

inline float origin(float max) { return max == -kInfinity ? 0.0f : max; }

// Of the part that follows.
inline void merge(PartSums* row, PartSums next, const Problem& problem) {
  const float before = origin(row->hard.max);
  if (!problem.slots) merge(&row->soft, next.soft, problem.rate);
  merge(&row->hard, next.hard, kLog2e);
  merge(&row->tail, next.tail, problem.rate);
  const double max = origin(row->hard.max);
  row->smoothed += row->weights * (before - max);
  row->smoothed += next.smoothed + next.weights * (origin(next.hard.max) - max);
  row->weights += next.weights;
}

// Computes on parts of rows, in memory of its own; one for each piece of work.
class Worker {
 public:
  // `whole_rows`: one row after the other, all passes over each.
  Worker(const Problem& problem, const SoftmaxKlFunctions& kernel, bool whole_rows = false)
      : problem_(problem),
        kernel_(kernel),
        bins_(problem.slots ? problem.slots->count + 1 : 0),
        kept_(whole_rows && keeps_slopes() ? std::min(problem.classes, kMostKept) : 0),
        memory_((3 * problem.part_size() + 3 * bins_ + kept_) * int64_t(sizeof(float))) {}

  // In the kernels' order, as all that is of two rows.
  SoftmaxKlMaxima maxima(const Part& part) const {
    const auto [s, t] = rows_of(part);
    return kernel_.maxima(s, t, part.size);
  }

  // What can be kept of a part whose gradient is to be at `gradient` (nullptr: nothing).
  Kept kept(const Part& part, void* gradient) const {
    if (gradient == nullptr || !keeps_slopes()) return {};
    float* scratch = buffer(3) + 3 * bins_ + part.begin;
    return {static_cast<float*>(gradient), part.begin + part.size <= kept_ ? scratch : nullptr,
            problem_.reversed};
  }

  // `maxima` of the whole row, and what is kept, where the divergence has slopes.
  PartSums forward(const Part& part, SoftmaxKlMaxima maxima, const Kept& kept) const {
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
      LogitRow first = s, second = see(problem_.teacher, part, 1);
      if (problem_.reversed) std::swap(first, second);
      sums.soft = problem_.has_slopes()
                      ? kernel_.exponentials(first, second, part.size, problem_.rate, maxima, kept)
                      : kernel_.forward(first, second, part.size, problem_.rate);
    }
    return sums;
  }

  SoftmaxKlSlopes slopes(const Part& part, const SoftmaxKlRow& row, const Kept& kept) const {
    const auto [s, t] = rows_of(part);
    return kernel_.slopes(s, t, part.size, problem_.rate, row, problem_.divergence, kept);
  }

  // The divergence of a row; of one with a second pass that is not known yet.
  float soft(int64_t row, const PartSums& sums, Saved* saved) const {
    if (problem_.slots) {
      saved->tail_max = sums.tail.max;
      saved->tail_sum = float(sums.tail.sum);
      return of_bins(row, saved);
    }
    const FinishedRow finished = finish(sums.soft, problem_.rate);
    saved->soft = finished.row;
    return finished.kl;
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
                double sum_of_weights, bool for_teacher, const Kept& kept, void* out) const {
    const Logits& logits = for_teacher ? problem_.teacher : problem_.student;
    const FloatType type = logits.rows.type;
    const int64_t n = part.size;
    if (soft_scale == 0 && hard_scale == 0)  // what is masked out keeps its NaN in the loss
      return void(std::memset(out, 0, static_cast<std::size_t>(n * bytes_of(type))));
    if (is_nan(soft_scale, saved.soft.log2_ratio) || is_nan(hard_scale, saved.inverse_sum))
      return fill_with_nan(type, out, n);
    if (hard_scale == 0 && !logits.seen.changes() && !problem_.slots)
      return kept.gradient != nullptr
                 ? gradient_of_slopes(part, saved, soft_scale, kept)
                 : soft_gradient(see(problem_.student, part, 0), see(problem_.teacher, part, 1), n,
                                 saved, soft_scale, for_teacher, out);
    if (soft_scale != 0 && hard_scale != 0 && adds_hard(logits))
      return both_gradients(part, saved, soft_scale, hard_scale, kept, out);
    const bool in_place = type == FloatType::float32 && !logits.seen.changes();
    float* sum = in_place ? static_cast<float*>(out) : buffer(2);
    const LogitRow z = widened(logits, part, for_teacher ? 1 : 0);
    if (soft_scale == 0 || problem_.slots)
      std::fill(sum, sum + n, 0.0f);
    else if (kept.gradient != nullptr)
      gradient_of_slopes(part, saved, soft_scale, kept);
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

  // In the kernels' order.
  std::pair<LogitRow, LogitRow> rows_of(const Part& part) const {
    const LogitRow s = see(problem_.student, part, 0), t = see(problem_.teacher, part, 1);
    return problem_.reversed ? std::pair(t, s) : std::pair(s, t);
  }
  void soft_gradient(LogitRow s, LogitRow t, int64_t n, const Saved& saved, float scale,
                     bool for_teacher, void* out, const CrossEntropyTerm& hard = {}) const {
    if (problem_.reversed) std::swap(s, t);
    const auto run =
        for_teacher != problem_.reversed ? kernel_.teacher_gradient : kernel_.student_gradient;
    run(s, t, n, problem_.rate, saved.soft, problem_.divergence, scale, hard, out);
  }

  // Whether the student's slopes can be left where its gradient is to be.
  bool keeps_slopes() const {
    const Logits &student = problem_.student, &teacher = problem_.teacher;
    return problem_.has_slopes() && student.rows.type == FloatType::float32 &&
           !student.seen.changes() &&
           (teacher.rows.type == FloatType::float32 || teacher.seen.changes());
  }
  void gradient_of_slopes(const Part& part, const Saved& saved, float scale, const Kept& kept,
                          const CrossEntropyTerm& hard = {}) const {
    const LogitRow z = problem_.student.at(part.row, part.begin);
    kernel_.gradient_of_slopes(static_cast<const float*>(z.data), part.size, problem_.rate,
                               saved.soft, problem_.divergence, scale, hard, kept);
  }

  // Whether a kernel adds the cross entropy's gradient to the divergence's.
  bool adds_hard(const Logits& student) const {
    const Logits& teacher = problem_.teacher;
    const FloatType type = student.rows.type;
    return !problem_.slots && !problem_.class_weight && !student.seen.changes() &&
           type != FloatType::float16 &&
           type == (teacher.seen.changes() ? FloatType::float32 : teacher.rows.type);
  }
  void both_gradients(const Part& part, const Saved& saved, float soft_scale, float hard_scale,
                      const Kept& kept, void* out) const {
    const double of_each = hard_scale * problem_.smoothing / double(problem_.classes);
    const CrossEntropyTerm hard{saved.max, hard_scale * saved.inverse_sum, float(of_each)};
    if (kept.gradient != nullptr)
      gradient_of_slopes(part, saved, soft_scale, kept, hard);
    else
      soft_gradient(see(problem_.student, part, 0), see(problem_.teacher, part, 1), part.size,
                    saved, soft_scale, false, out, hard);
    const int64_t label = problem_.label(part.row), at = label - part.begin;
    if (at < 0 || at >= part.size) return;
    // Of the label itself once more, because it must be rounded once.
    float s, t, gradient;
    kernel_.see(problem_.student.at(part.row, label), 1, problem_.student.seen, &s);
    kernel_.see(problem_.teacher.at(part.row, label), 1, problem_.teacher.seen, &t);
    soft_gradient({&s, FloatType::float32}, {&t, FloatType::float32}, 1, saved, soft_scale, false,
                  &gradient, hard);
    gradient -= float(hard_scale * (1 - problem_.smoothing));
    const FloatType type = problem_.student.rows.type;
    kernel_.see_backward({&s, type}, 1, {}, &gradient,
                         static_cast<char*>(out) + at * bytes_of(type));
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

  float of_bins(int64_t row, Saved* saved) const {
    fill_bins(row, *saved);
    const auto [s, t] = bin_rows();
    const LogitRow first = problem_.reversed ? t : s, second = problem_.reversed ? s : t;
    const SoftmaxKlSums sums = kernel_.forward(first, second, bins_, problem_.rate);
    const FinishedRow finished = finish(sums, problem_.rate);
    saved->soft = finished.row;
    if (problem_.divergence.kind == Divergence::kullback_leibler) return finished.kl;
    return finish(
        kernel_.slopes(first, second, bins_, problem_.rate, finished.row, problem_.divergence, {}),
        sums, &saved->soft);
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
  int64_t bins_, kept_;  // kept_: of a row's classes, the first of them
  // Logits of both models, a gradient, the bins' logits and gradient, what is kept.
  Scratch memory_;

  // Less than half a MB; it comes to the memory that the gradient takes.
  static constexpr int64_t kMostKept = 7 << 14;
};

}  // namespace
}  // namespace trine
