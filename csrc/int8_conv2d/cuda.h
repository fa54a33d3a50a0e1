// The CUDA kernels of int8_conv2d; int8_conv2d.h says what they compute.
#pragma once

#include "common/cuda/linear.h"
#include "int8_conv2d/int8_conv2d.h"
#include "quantize_rows/cuda.h"

namespace trine {

// A convolution as a linear layer: of `linear`, m are the output pixels of all images, n all output
// channels; q the quantised images, x_scale one scale of each.
struct DeviceConv {
  ConvShape shape;
  int64_t blocks, block_bytes, taps, out_pixels;  // of `shape`
  DeviceLinear linear;
  int64_t y_channel, y_pixel;  // elements from channel to channel, and from pixel to pixel
};

// Sizes alone.
inline DeviceConv device_conv(const ConvShape& shape, int64_t batch) {
  DeviceConv conv = {};
  conv.shape = shape;
  conv.blocks = shape.blocks(), conv.block_bytes = shape.block_bytes();
  conv.taps = shape.taps(), conv.out_pixels = shape.out_pixels();
  conv.linear.m = batch * shape.out_pixels(), conv.linear.n = shape.out_channels;
  return conv;
}

// Output pixels of a call: they are numbered in 32 bits, where division is fast.
inline constexpr int64_t kConvMostPixels = INT32_MAX;

// Parts of an image, of each of which `most` holds a number.
inline constexpr int64_t kConvMostParts = 64;

struct ImagesToQuantize {
  const void* x;
  FloatType type;
  int64_t x_channel, x_pixel;  // elements
  const float* input_scale;    // or null: each image has its own
  const int32_t* zero_point;   // or null
  uint32_t* most;              // [batch][kConvMostParts], for the kernels' own use
  uint8_t* q;                  // [batch][image_bytes]
  float* scale;                // [batch]
};

// All return when the work is queued on `stream`.
void quantize_images_cuda(const ConvShape& shape, int64_t batch, const ImagesToQuantize& images,
                          cudaStream_t stream);

void int8_conv2d_cuda(const DeviceConv& conv, cudaStream_t stream);

// minus[n] = zero_point * the sum of the weights of output channel n, modulo 2^32.
void conv_zero_point_cuda(const DeviceConv& conv, const int32_t* zero_point, int32_t* minus,
                          cudaStream_t stream);

}  // namespace trine
