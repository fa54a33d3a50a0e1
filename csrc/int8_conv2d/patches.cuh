// Where the convolutions read and write: the patch of an output pixel, and the pixel itself.
#pragma once

#include "common/cuda/finish.cuh"
#include "int8_conv2d/cuda.h"

namespace trine {
namespace {

// Of output pixel m of all images.
struct Pixel {
  int64_t image;
  uint32_t y, x;
};

__device__ __forceinline__ Pixel pixel_of(const DeviceConv& conv, uint32_t m) {
  const uint32_t pixels = uint32_t(conv.out_pixels), width = uint32_t(conv.shape.out_width);
  const uint32_t image = m / pixels, in_image = m - image * pixels;
  const uint32_t y = in_image / width;
  return {image, y, in_image - y * width};
}

// Its patch begins here; the border makes sure that no value of it lies outside.
__device__ __forceinline__ const int8_t* patch_of(const DeviceConv& conv, const Pixel& pixel) {
  const ConvShape& shape = conv.shape;
  return conv.linear.q + pixel.image * shape.image_bytes +
         pixel.y * shape.stride_h * shape.row_bytes + pixel.x * shape.stride_w * shape.pixel_bytes;
}

// From there to tap (y, x) of the kernel.
__device__ __forceinline__ int64_t offset_of_tap(const ConvShape& shape, uint32_t tap) {
  const auto kernel_w = uint32_t(shape.kernel_w);
  const uint32_t y = tap / kernel_w, x = tap - y * kernel_w;
  return y * shape.dilation_h * shape.row_bytes + x * shape.dilation_w * shape.pixel_bytes;
}

// The element of y that holds output channel 0 of the pixel.
__device__ __forceinline__ int64_t place_of(const DeviceConv& conv, const Pixel& pixel) {
  return pixel.image * conv.linear.n * conv.out_pixels +
         (pixel.y * conv.shape.out_width + pixel.x) * conv.y_pixel;
}

}  // namespace
}  // namespace trine
