// Images as the convolutions read them: bytes, quantised once, the padding at the zero point.
//
// What bounds it: memory. An image is read twice, first for its largest magnitude and whether all
// of it is finite, which blocks share among them.
#pragma once

#include <algorithm>

#include "common/cuda/launch.cuh"
#include "int8_conv2d/cuda.h"
#include "quantize_rows/rows.cuh"

namespace trine {
namespace {

constexpr int kImageThreads = 256;
constexpr int kImageChunks = 4;  // that a thread has on their way

// Without their sign the bits of floats order as integers do, NaN above infinity.
template <class T, bool kWide>
__global__ void __launch_bounds__(kImageThreads)
    largest_kernel(const char* x, int64_t values, int parts, uint32_t* most) {
  const int64_t image = blockIdx.x / uint32_t(parts);
  const int part = int(blockIdx.x % uint32_t(parts));
  const char* const row = x + image * values * int64_t(sizeof(T));
  const int64_t chunks = (values + kChunkValues<T> - 1) / kChunkValues<T>;
  uint32_t largest = 0;
  for (int64_t first = part * kImageThreads + int(threadIdx.x); first < chunks;
       first += int64_t(kImageChunks) * parts * kImageThreads) {
    Chunk<T> held[kImageChunks] = {};
#pragma unroll
    for (int i = 0; i < kImageChunks; ++i) {
      const int64_t c = first + int64_t(i) * parts * kImageThreads;
      if (c < chunks) held[i] = load_chunk<T, kWide>(row, values, c);
    }
#pragma unroll
    for (int i = 0; i < kImageChunks; ++i) largest = largest_magnitude(held[i], largest);
  }
  TRINE_SHARED_ARRAY(uint32_t, warp_largest, kImageThreads / kWarpThreads);
  largest = reduce_threads<kImageThreads>(largest, Maximum{}, warp_largest);
  if (threadIdx.x == 0) most[image * kConvMostParts + part] = largest;
}

// A block quantises a row of the padded pixels of an image. A thread works on kWords words of four
// channels of a pixel: where channels lie in planes, neighbouring threads take neighbouring pixels,
// otherwise neighbouring words, so that they read side by side.
template <class T, int kWords, bool kStatic>
__global__ void __launch_bounds__(kImageThreads)
    fill_images_kernel(ConvShape shape, ImagesToQuantize images, int parts) {
  constexpr bool kPlanes = kWords > 1;
  const auto rows = uint32_t(shape.height + 2 * shape.padding_h);
  const int64_t image = blockIdx.x / rows;
  const int64_t padded_y = blockIdx.x % rows;
  const int64_t y = padded_y - shape.padding_h;

  uint32_t largest = 0;
  for (int part = int(threadIdx.x) % kWarpThreads; part < parts; part += kWarpThreads)
    largest = Maximum{}(largest, images.most[image * kConvMostParts + part]);
  largest = reduce_lanes<kWarpThreads>(largest, Maximum{});
  RowScaling scaling = row_scaling(largest);
  int32_t zero_point = 0;
  if constexpr (kStatic) {
    if (images.zero_point != nullptr) zero_point = *images.zero_point;
    const bool finite = largest < kInfinityBits;
    scaling.scale = finite ? *images.input_scale : __uint_as_float(kMagnitudeBits);
  }
  if (padded_y == 0 && threadIdx.x == 0) images.scale[image] = scaling.scale;

  const auto width = uint32_t(shape.width + 2 * shape.padding_w);
  const auto words = uint32_t(shape.pixel_bytes / kConvQuad);
  const auto quads = uint32_t(shape.group_bytes / kConvQuad);
  const uint32_t chunks = (words + kWords - 1) / kWords;
  const int64_t of_group = shape.channels / shape.input_groups;
  const T* const x = static_cast<const T*>(images.x) +
                     image * shape.channels * shape.height * shape.width +
                     y * shape.width * images.x_pixel;
  uint8_t* const q = images.q + image * shape.image_bytes + padded_y * shape.row_bytes;
  for (uint32_t i = threadIdx.x; i < width * chunks; i += kImageThreads) {
    const uint32_t pixel = kPlanes ? i % width : i / chunks;
    const uint32_t chunk = kPlanes ? i / width : i % chunks;
    const int64_t from = int64_t(pixel) - shape.padding_w;
    const bool inside = y >= 0 && y < shape.height && from >= 0 && from < shape.width;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const uint32_t word = chunk * kWords + w;
      if (word >= words) break;
      const int64_t group = word / quads, first = int64_t(word % quads) * kConvQuad;
      uint32_t four = 0;
#pragma unroll
      for (int j = 0; j < int(kConvQuad); ++j) {
        const bool known = inside && first + j < of_group;
        uint32_t bits = uint32_t(zero_point);
        if (known) {
          float value;
          const T* const at =
              x + (group * of_group + first + j) * images.x_channel + from * images.x_pixel;
          if constexpr (sizeof(T) == 4)
            value = *at;
          else
            value = widen_on_device(*at);
          if constexpr (kStatic)
            bits = quantize_static_to_low_byte(value, *images.input_scale, zero_point);
          else
            bits = quantize_to_low_byte(value, scaling.to_q) & scaling.keep;
        }
        four |= (bits & 0xffu) << 8 * j;
      }
      store_global<4>(q + pixel * shape.pixel_bytes + word * kConvQuad, &four);
    }
  }
}

template <class T>
void quantize_images(const ConvShape& shape, int64_t batch, const ImagesToQuantize& images,
                     cudaStream_t stream) {
  const int64_t values = shape.channels * shape.height * shape.width;
  constexpr int64_t kOfBlock = int64_t(kImageThreads) * kImageChunks * kChunkValues<T>;
  const int parts = int(std::clamp<int64_t>((values + kOfBlock - 1) / kOfBlock, 1, kConvMostParts));
  const bool wide =
      values % kChunkValues<T> == 0 && reinterpret_cast<uintptr_t>(images.x) % kChunkBytes == 0;
  launch("int8_conv2d", wide ? largest_kernel<T, true> : largest_kernel<T, false>,
         {batch * parts, kImageThreads}, stream, static_cast<const char*>(images.x), values, parts,
         images.most);
  const auto fill = [&]<int kWords, bool kStatic>() {
    launch("int8_conv2d", fill_images_kernel<T, kWords, kStatic>,
           {batch * (shape.height + 2 * shape.padding_h), kImageThreads}, stream, shape, images,
           parts);
  };
  const bool is_static = images.input_scale != nullptr;
  if (images.x_channel == 1)
    is_static ? fill.template operator()<1, true>() : fill.template operator()<1, false>();
  else
    is_static ? fill.template operator()<4, true>() : fill.template operator()<4, false>();
}

}  // namespace
}  // namespace trine
