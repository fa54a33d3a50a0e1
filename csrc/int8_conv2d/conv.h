// The convolution on every instruction set; a kernel file says how to multiply.
//
// A tile is `kPixels` pixels by `kBlocks` blocks of 16 output channels, whose sums stay in
// registers: every quad of four input channels costs kBlocks loads of weights, kPixels broadcasts
// of activations and kPixels * kBlocks dot products. With 6 x 4 vectors (AVX-512) that is 10 loads
// to 24 products, so the products are the bound; the weights of a tile, some 100 KB, come from L2.
//
// How far from it (Zen 4, AVX-512 VNNI, one thread, quantising and scaling included; the products
// alone peak at some 440 GOP/s): 3 x 3 kernels of 64 to 256 channels take 300 to 340, 1 x 1 kernels
// 130 to 220, three channels under 7 x 7 170. There an image is read and a result written for few
// products. Depthwise convolutions are nothing but that: 10 to 12 GOP/s, 0.7 to 0.8 times fp32's.
//
// Simd:
//   kOffset: what is added to the bytes of an image, 128 where products want them unsigned
//   Sum, Weight, Quad: a block's sums, its weights for a quad, four activations for all of it
//   zero(), load(weights), spread(activations), dot(Sum, Quad, Weight), write(Sum, int32_t*)
//   Tap: the weights of 16 channels for one tap of a depthwise convolution
//   load_tap(weights), add_tap(Sum, signed activations, Tap)
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "int8_conv2d/int8_conv2d.h"

namespace trine {
namespace {

constexpr int64_t kMostTilePixels = 12, kMostTileChannels = 64;

template <class T>
uint32_t largest_of(const T* x, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, to_bits(widen(x[i])) & 0x7fffffffu);
  return most;
}

uint32_t largest(const void* x, FloatType type, int64_t count) {
  switch (type) {
    case FloatType::float32:
      return largest_of(static_cast<const float*>(x), count);
    case FloatType::bfloat16:
      return largest_of(static_cast<const bfloat16*>(x), count);
    case FloatType::float16:
      return largest_of(static_cast<const float16*>(x), count);
  }
  return 0;
}

// Rounds half to even where |x| < 2^22, by pushing the fraction out of the mantissa.
inline float round_small(float x) { return (x + 12582912.0f) - 12582912.0f; }

// As quantize_rows does where scales are found, as ONNX's QuantizeLinear where one is given.
template <class T>
void quantize(const T* x, int64_t count, float factor, bool divide, int32_t zero_point,
              uint8_t offset, uint8_t* out) {
  const int32_t shift = zero_point + offset;
  if (divide) {
    for (int64_t i = 0; i < count; ++i) {
      const float steps = std::min(std::max(widen(x[i]) / factor, -512.0f), 512.0f);
      const int32_t q = static_cast<int32_t>(round_small(steps)) + zero_point;
      out[i] = static_cast<uint8_t>(std::min(std::max(q, -128), 127) + offset);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const float steps = std::min(std::max(widen(x[i]) * factor, -127.0f), 127.0f);
    out[i] = static_cast<uint8_t>(static_cast<int32_t>(round_small(steps)) + shift);
  }
}

// Rows of pixels gathered from planes: four channels at a time. In a plane the rows follow each
// other, so that what is quantised at a time is long even where the rows are short.
template <class T>
void fill_from_planes(const Conv& c, const T* x, int64_t rows, float factor, uint8_t offset,
                      uint8_t* out) {
  constexpr int64_t kSpan = 128;  // pixels: what is quantised at a time stays in L1
  alignas(64) uint8_t planes[kConvQuad][kSpan];
  alignas(64) uint32_t quads[kSpan];
  const int64_t of_group = c.channels / c.input_groups, pixels = rows * c.width;
  const int64_t border = c.row_bytes - c.width * c.pixel_bytes;
  for (int64_t begin = 0; begin < pixels; begin += kSpan) {
    const int64_t span = std::min(kSpan, pixels - begin), column = begin % c.width;
    uint8_t* from = out + begin / c.width * c.row_bytes + column * c.pixel_bytes;
    for (int64_t group = 0; group < c.input_groups; ++group) {
      for (int64_t first = 0; first < of_group; first += kConvQuad) {
        const int64_t count = std::min(kConvQuad, of_group - first);
        for (int64_t i = 0; i < count; ++i)
          quantize(x + (group * of_group + first + i) * c.x_channel + begin, span, factor,
                   c.static_scale, c.zero_point, offset, planes[i]);
        // Channels that are padding meet weights of 0.
        for (int64_t i = count; i < kConvQuad; ++i) std::memset(planes[i], 0, span);
        for (int64_t p = 0; p < span; ++p)
          quads[p] =
              planes[0][p] | planes[1][p] << 8 | planes[2][p] << 16 | uint32_t{planes[3][p]} << 24;
        uint8_t* at = from + group * c.group_bytes + first;
        int64_t left = c.width - column;
        for (int64_t p = 0; p < span; ++p, at += c.pixel_bytes) {
          if (left-- == 0) at += border, left = c.width - 1;
          std::memcpy(at, quads + p, 4);
        }
      }
    }
  }
}

// The same where the channels of a pixel lie together (channels_last).
template <class T>
void fill_from_pixels(const Conv& c, const T* x, int64_t rows, float factor, uint8_t offset,
                      uint8_t* out) {
  const bool together = c.pixel_bytes == c.channels;  // no padding: a row at a time
  const int64_t runs = together ? 1 : c.width, groups = together ? 1 : c.input_groups;
  const int64_t run = together ? c.width * c.channels : c.channels / c.input_groups;
  for (int64_t row = 0; row < rows; ++row, out += c.row_bytes)
    for (int64_t p = 0; p < runs; ++p)
      for (int64_t group = 0; group < groups; ++group, x += run)
        quantize(x, run, factor, c.static_scale, c.zero_point, offset,
                 out + p * c.pixel_bytes + group * c.group_bytes);
}

// Rows `begin` to `end` of the image, which has no border.
template <class T>
void fill_rows_of(const Conv& c, int64_t image, int64_t begin, int64_t end, uint8_t offset,
                  uint8_t* out) {
  const T* x = static_cast<const T*>(c.x) + image * c.channels * c.height * c.width +
               begin * c.width * c.x_pixel;
  if (c.x_channel != 1 || c.channels == 1)
    fill_from_planes(c, x, end - begin, c.factor[image], offset, out);
  else
    fill_from_pixels(c, x, end - begin, c.factor[image], offset, out);
}

void fill_rows(const Conv& c, int64_t image, int64_t begin, int64_t end, uint8_t offset) {
  if (c.depthwise) offset = 0;
  uint8_t* out = c.images + image * c.image_bytes;
  const int zero = static_cast<uint8_t>(c.zero_point + offset);
  std::memset(out + begin * c.row_bytes, zero, (end - begin) * c.row_bytes);
  begin = std::max<int64_t>(begin - c.padding_h, 0);
  end = std::min(end - c.padding_h, c.height);
  // Scale 0: all values are 0. NaN: the results are NaN whatever the bytes.
  if (begin >= end || !(c.scale[image] > 0.0f)) return;
  out += (begin + c.padding_h) * c.row_bytes + c.padding_w * c.pixel_bytes;
  switch (c.type) {
    case FloatType::float32:
      return fill_rows_of<float>(c, image, begin, end, offset, out);
    case FloatType::bfloat16:
      return fill_rows_of<bfloat16>(c, image, begin, end, offset, out);
    case FloatType::float16:
      return fill_rows_of<float16>(c, image, begin, end, offset, out);
  }
}

void sum_weights(const Conv& c, int64_t block_begin, int64_t block_end) {
  const int64_t lane = c.depthwise ? 1 : kConvQuad;
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int8_t* w = c.weight + block * c.block_bytes();
    int32_t sums[kConvBlock] = {};
    for (int64_t k = 0; k < c.block_bytes(); k += kConvBlock * lane)
      for (int64_t n = 0; n < kConvBlock; ++n)
        for (int64_t i = 0; i < lane; ++i) sums[n] += w[k + n * lane + i];
    std::memcpy(c.weight_sum + block * kConvBlock, sums, sizeof sums);
  }
}

// Writes a tile of `pixels` by `channels` sums: scaled channel by channel side by side, then
// turned.
template <class T>
void store_tile(const Conv& c, const ConvPart& part, int64_t first, int64_t channels, int64_t pixel,
                int64_t pixels, const int32_t* sums, int64_t stride, int32_t shift) {
  const float scale = c.scale[part.image];
  const int32_t* weight_sum = c.weight_sum + part.group * c.blocks() * kConvBlock + first;
  const int64_t channel = c.depthwise ? first : part.group * (c.out_channels / c.groups) + first;
  const float* weight_scale = c.weight_scale + channel;
  const float* bias = c.bias == nullptr ? nullptr : c.bias + channel;
  alignas(64) float values[kMostTilePixels * kMostTileChannels];
  for (int64_t p = 0; p < pixels; ++p) {
    float* row = values + p * kMostTileChannels;
    const int32_t* sum = sums + p * stride;
    for (int64_t n = 0; n < channels; ++n)
      row[n] = (static_cast<float>(sum[n] - shift * weight_sum[n]) * scale) * weight_scale[n];
    if (bias != nullptr)
      for (int64_t n = 0; n < channels; ++n) row[n] = row[n] + bias[n];
  }
  T* y = static_cast<T*>(c.y) + part.image * c.out_channels * c.out_height * c.out_width +
         channel * c.y_channel + pixel * c.y_pixel;
  if (c.y_channel == 1) {
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t n = 0; n < channels; ++n)
        narrow(values[p * kMostTileChannels + n], y + p * c.y_pixel + n);
    return;
  }
  for (int64_t n = 0; n < channels; ++n)
    for (int64_t p = 0; p < pixels; ++p)
      narrow(values[p * kMostTileChannels + n], y + n * c.y_channel + p);
}

void store_any(const Conv& c, const ConvPart& part, int64_t first, int64_t channels, int64_t pixel,
               int64_t pixels, const int32_t* sums, int64_t stride, int32_t shift) {
  switch (c.type) {
    case FloatType::float32:
      return store_tile<float>(c, part, first, channels, pixel, pixels, sums, stride, shift);
    case FloatType::bfloat16:
      return store_tile<bfloat16>(c, part, first, channels, pixel, pixels, sums, stride, shift);
    case FloatType::float16:
      return store_tile<float16>(c, part, first, channels, pixel, pixels, sums, stride, shift);
  }
}

// Where the patches of `pixels` pixels begin; a tile that is not full has the last one again.
template <int kPixels>
void find_patches(const Conv& c, int64_t image, int64_t pixel, int64_t pixels, int64_t first,
                  const uint8_t** at) {
  int64_t oy = pixel / c.out_width, ox = pixel % c.out_width;
  const uint8_t* base = c.images + image * c.image_bytes + first;
  for (int64_t p = 0; p < kPixels; ++p) {
    at[p] = base + oy * c.stride_h * c.row_bytes + ox * c.stride_w * c.pixel_bytes;
    if (p + 1 < pixels && ++ox == c.out_width) ox = 0, ++oy;
  }
}

// Its sums stay in registers only where it is a function of its own.
template <class Simd, int kPixels, int kBlocks>
[[gnu::noinline]] void multiply_tile(const Conv& c, const uint8_t* const* at, const int8_t* weight,
                                     int32_t* sums) {
  typename Simd::Sum acc[kPixels][kBlocks];
#pragma GCC unroll 32
  for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) acc[p][b] = Simd::zero();

  const int64_t block_bytes = c.block_bytes();
  // The taps of a row lie side by side where nothing lies in between.
  const bool together = c.dilation_w == 1 && c.groups == 1;
  const int64_t runs = together ? 1 : c.kernel_w;
  const int64_t run_bytes = together ? c.kernel_w * c.pixel_bytes : c.group_bytes;
  for (int64_t ky = 0; ky < c.kernel_h; ++ky) {
    for (int64_t run = 0; run < runs; ++run) {
      const int64_t from = ky * c.dilation_h * c.row_bytes + run * c.dilation_w * c.pixel_bytes;
      for (int64_t k = from; k < from + run_bytes; k += kConvQuad) {
        typename Simd::Weight w[kBlocks];
#pragma GCC unroll 4
        for (int b = 0; b < kBlocks; ++b) w[b] = Simd::load(weight + b * block_bytes);
        weight += kConvBlock * kConvQuad;
#pragma GCC unroll 32
        for (int p = 0; p < kPixels; ++p) {
          const typename Simd::Quad quad = Simd::spread(at[p] + k);
#pragma GCC unroll 4
          for (int b = 0; b < kBlocks; ++b) Simd::dot(acc[p][b], quad, w[b]);
        }
      }
    }
  }
#pragma GCC unroll 32
  for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) Simd::write(acc[p][b], sums + (p * kBlocks + b) * kConvBlock);
}

template <class Simd, int kPixels, int kBlocks>
void run_blocks(const Conv& c, const ConvPart& part, int64_t block, uint8_t offset) {
  alignas(64) int32_t sums[kPixels * kBlocks * kConvBlock];
  const int8_t* weight = c.weight + (part.group * c.blocks() + block) * c.block_bytes();
  const int64_t first = block * kConvBlock;
  const int64_t channels =
      std::min<int64_t>(kBlocks * kConvBlock, c.out_channels / c.groups - first);
  for (int64_t pixel = part.pixel_begin; pixel < part.pixel_end; pixel += kPixels) {
    const int64_t pixels = std::min<int64_t>(kPixels, part.pixel_end - pixel);
    const uint8_t* at[kPixels];
    find_patches<kPixels>(c, part.image, pixel, pixels, part.group * c.group_bytes, at);
    multiply_tile<Simd, kPixels, kBlocks>(c, at, weight, sums);
    store_any(c, part, first, channels, pixel, pixels, sums, kBlocks * kConvBlock,
              c.zero_point + offset);
  }
}

// One channel in, one out: 16 channels side by side, tap after tap, for a few pixels at a time.
template <class Simd, int kPixels>
[[gnu::noinline]] void multiply_depthwise(const Conv& c, const uint8_t* const* at,
                                          const int8_t* weight, int32_t* sums) {
  typename Simd::Sum acc[kPixels];
#pragma GCC unroll 16
  for (int p = 0; p < kPixels; ++p) acc[p] = Simd::zero();
  for (int64_t ky = 0; ky < c.kernel_h; ++ky)
    for (int64_t kx = 0; kx < c.kernel_w; ++kx, weight += kConvBlock) {
      const int64_t k = ky * c.dilation_h * c.row_bytes + kx * c.dilation_w * c.pixel_bytes;
      const typename Simd::Tap tap = Simd::load_tap(weight);
#pragma GCC unroll 16
      for (int p = 0; p < kPixels; ++p)
        Simd::add_tap(acc[p], reinterpret_cast<const int8_t*>(at[p]) + k, tap);
    }
#pragma GCC unroll 16
  for (int p = 0; p < kPixels; ++p) Simd::write(acc[p], sums + p * kConvBlock);
}

template <class Simd>
void run_depthwise(const Conv& c, const ConvPart& part) {
  constexpr int kPixels = Simd::kTapPixels;
  alignas(64) int32_t sums[kPixels * kConvBlock];
  for (int64_t block = part.block_begin; block < part.block_end; ++block) {
    const int64_t first = block * kConvBlock;
    const int64_t channels = std::min(kConvBlock, c.channels - first);
    for (int64_t pixel = part.pixel_begin; pixel < part.pixel_end; pixel += kPixels) {
      const int64_t pixels = std::min<int64_t>(kPixels, part.pixel_end - pixel);
      const uint8_t* at[kPixels];
      find_patches<kPixels>(c, part.image, pixel, pixels, first, at);
      multiply_depthwise<Simd, kPixels>(c, at, c.weight + block * c.block_bytes(), sums);
      store_any(c, part, first, channels, pixel, pixels, sums, kConvBlock, c.zero_point);
    }
  }
}

template <class Simd>
void run(const Conv& c, const ConvPart& part, uint8_t offset) {
  if (c.depthwise) return run_depthwise<Simd>(c, part);
  int64_t block = part.block_begin;
  if constexpr (Simd::kMostBlocks == 4) {
    for (; block + 4 <= part.block_end; block += 4)
      run_blocks<Simd, Simd::pixels(4), 4>(c, part, block, offset);
    for (; block + 2 <= part.block_end; block += 2)
      run_blocks<Simd, Simd::pixels(2), 2>(c, part, block, offset);
  }
  for (; block < part.block_end; ++block)
    run_blocks<Simd, Simd::pixels(1), 1>(c, part, block, offset);
}

}  // namespace

// A kernel file ends with `const Int8Conv2dKernel int8_conv2d_<isa> = conv_kernel<Simd>();`.
namespace {
template <class Simd>
constexpr Int8Conv2dKernel conv_kernel() {
  return {Simd::kOffset, largest, fill_rows, sum_weights, run<Simd>};
}
}  // namespace

}  // namespace trine
