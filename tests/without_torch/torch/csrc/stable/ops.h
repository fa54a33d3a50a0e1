#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <thread>

namespace torch::stable {

inline Tensor new_empty(const Tensor& self, const Tensor::Sizes& sizes,
                        std::optional<ScalarType> type = std::nullopt) {
  return Tensor(sizes, type.value_or(self.scalar_type()));
}

}  // namespace torch::stable

// The same as a C function. A handle owns what it points to.
using AtenTensorHandle = const torch::stable::Tensor*;
#define STABLE_TORCH_ERROR_CODE_CHECK(call) call
inline void aoti_torch_aten_new_empty(AtenTensorHandle self, const int64_t* sizes, int64_t dim,
                                      const int32_t* type, const int32_t*, const int32_t*, int32_t,
                                      const int32_t*, AtenTensorHandle* made) {
  using torch::stable::ScalarType, torch::stable::Tensor;
  *made = new Tensor(Tensor::Sizes(sizes, sizes + dim),
                     type == nullptr ? self->scalar_type() : static_cast<ScalarType>(*type));
}

namespace torch::stable {

// Matrices only.
inline Tensor contiguous(const Tensor& self) {
  if (self.is_contiguous()) return self;
  if (self.dim() != 2) throw std::logic_error("this stand-in copies matrices only");
  const Tensor copy(self.sizes(), self.scalar_type());
  const int64_t bytes = self.element_size();
  const auto* from = static_cast<const char*>(self.const_data_ptr());
  auto* to = static_cast<char*>(copy.mutable_data_ptr());
  for (int64_t i = 0; i < self.size(0); ++i)
    for (int64_t j = 0; j < self.size(1); ++j, to += bytes)
      std::memcpy(to, from + (i * self.stride(0) + j * self.stride(1)) * bytes, bytes);
  return copy;
}

inline std::atomic<uint32_t> threads{1};
// Plants a bug: each piece of a parallel_for goes one beyond its end.
inline std::atomic<bool> plant_overlap{false};

inline uint32_t get_num_threads() { return threads; }

// Starts a thread for each piece, however small: torch's grain is about speed only.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  const int64_t count = threads;
  if (begin >= end) return;
  if (count == 1) return f(begin, end);
  const int64_t piece = (end - begin + count - 1) / count, beyond = plant_overlap ? 1 : 0;
  std::vector<std::thread> running;
  for (int64_t from = begin; from < end; from += piece)
    running.emplace_back([&f, from, to = std::min(from + piece + beyond, end)] { f(from, to); });
  for (std::thread& thread : running) thread.join();
}

}  // namespace torch::stable
