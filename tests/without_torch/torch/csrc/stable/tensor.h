#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "memory.h"

namespace torch::stable {

using headeronly::ScalarType;

// Plants a bug: of the tensors with elements made from now on, number `short_tensor` lacks its last
// element. The counter is relaxed so that it does not order threads, which would hide races between
// them.
inline std::atomic<int> tensors_made{0}, short_tensor{-1};

// Aligned to its element type and no more: a view of a larger tensor need not be.
class Tensor {
 public:
  using Sizes = std::vector<int64_t>;

  Tensor(Sizes sizes, Sizes strides, ScalarType type)
      : sizes_(std::move(sizes)), strides_(std::move(strides)), type_(type) {
    int64_t extent = 1;  // elements, up to the last one that the strides reach
    for (std::size_t d = 0; d < sizes_.size(); ++d) extent += (sizes_[d] - 1) * strides_[d];
    if (numel() == 0)
      extent = 0;  // nothing to lack
    else if (tensors_made.fetch_add(1, std::memory_order_relaxed) == short_tensor)
      --extent;
    memory_ = std::make_shared<without_torch::Memory>(extent * element_size(), element_size());
  }
  Tensor(const Sizes& sizes, ScalarType type) : Tensor(sizes, contiguous_strides(sizes), type) {}

  explicit Tensor(const Tensor* handle) : Tensor(*handle) { delete handle; }
  const Tensor* get() const { return this; }

  ScalarType scalar_type() const { return type_; }
  int64_t element_size() const {
    constexpr int64_t kBytes[] = {1, 1, 4, 2, 4, 2, 8, 1};
    return kBytes[static_cast<int>(type_)];
  }
  int64_t dim() const { return int64_t(sizes_.size()); }
  const Sizes& sizes() const { return sizes_; }
  int64_t size(int64_t d) const { return sizes_.at(d); }
  int64_t stride(int64_t d) const { return strides_.at(d); }
  int64_t numel() const {
    int64_t count = 1;
    for (const int64_t size : sizes_) count *= size;
    return count;
  }
  bool is_contiguous() const { return numel() == 0 || strides_ == contiguous_strides(sizes_); }
  const void* const_data_ptr() const { return memory_->data(); }
  void* mutable_data_ptr() const { return memory_->data(); }

 private:
  static Sizes contiguous_strides(const Sizes& sizes) {
    Sizes strides(sizes.size());
    int64_t stride = 1;
    for (std::size_t d = sizes.size(); d-- > 0; stride *= sizes[d]) strides[d] = stride;
    return strides;
  }

  Sizes sizes_, strides_;
  ScalarType type_;
  std::shared_ptr<without_torch::Memory> memory_;
};

}  // namespace torch::stable
