// y[b][n][oy][ox] = (float(acc) * scale[b]) * weight_scale[n] + bias[n],
// acc = sum over c, ky, kx of (q[b][c][oy * stride + ky * dilation - padding][...] - zero point)
//       * w[n][c][ky][kx], exact in int32.
//
// An image is quantised once, into bytes [padded height][padded width][channels]: a quarter of its
// floats. The patches of a convolution are then addresses in it; they are never written out.
//
// Packed weight, int8, padding 0:
//   groups of several channels: [groups][ceil(N / groups / 16)][kh][kw][ceil(C / groups /
//   4)][16][4]
//     (16 output channels side by side, four input channels of each in one 32-bit lane)
//   depthwise (one channel in, one out): [ceil(C / 16)][kh][kw][16]
#pragma once

#include <cstdint>

#include "common/float_types.h"
#include "common/isa.h"

namespace trine {

inline constexpr int64_t kConvBlock = 16;  // output channels side by side
inline constexpr int64_t kConvQuad = 4;    // input channels in a 32-bit lane
// 255 * 127 * (values of a patch) must stay below 2^31.
inline constexpr int64_t kConvMaxPatch = 65536;

struct ConvShape {
  int64_t channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t groups, kernel_h, kernel_w;
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  bool depthwise;

  // The bytes of a padded image; those of a group's channels lie together (depthwise: of all).
  int64_t input_groups;
  int64_t group_bytes, pixel_bytes, row_bytes, image_bytes;

  int64_t blocks() const {  // of output channels, in a group
    const int64_t n = depthwise ? channels : out_channels / groups;
    return (n + kConvBlock - 1) / kConvBlock;
  }
  int64_t weight_blocks() const { return depthwise ? blocks() : groups * blocks(); }
  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t block_bytes() const {
    return depthwise ? taps() * kConvBlock : taps() * group_bytes * kConvBlock;
  }
  int64_t out_pixels() const { return out_height * out_width; }
};

struct Conv : ConvShape {
  const void* x;
  FloatType type;              // of x and y
  int64_t x_channel, x_pixel;  // elements from channel to channel, and from pixel to pixel
  void* y;
  int64_t y_channel, y_pixel;

  const int8_t* weight;
  const float* weight_scale;  // [out_channels]
  const float* bias;          // [out_channels], or null
  int32_t* weight_sum;        // [groups][blocks][16], once `sum_weights` has filled it

  uint8_t* images;
  const float* scale;   // of each image; NaN marks one that held NaN or infinity
  const float* factor;  // of each image: what values are multiplied with (static: divided by)
  int32_t zero_point;
  bool static_scale;
};

// The output channels and pixels of one image that a call computes; pixels are numbered row by row.
struct ConvPart {
  int64_t image, group, block_begin, block_end, pixel_begin, pixel_end;
};

struct Int8Conv2dKernel {
  uint8_t offset;  // added to the bytes of images that are not convolved depthwise
  // The largest magnitude of `count` values, as the bits of a float: infinity and NaN are greater
  // than all others.
  uint32_t (*largest)(const void* x, FloatType type, int64_t count);
  // Quantises rows (of the padded ones) of an image.
  void (*fill_rows)(const Conv& conv, int64_t image, int64_t begin, int64_t end, uint8_t offset);
  void (*sum_weights)(const Conv& conv, int64_t block_begin, int64_t block_end);
  void (*run)(const Conv& conv, const ConvPart& part, uint8_t offset);
};

extern const Int8Conv2dKernel int8_conv2d_scalar, int8_conv2d_avx2, int8_conv2d_avx512vnni,
    int8_conv2d_dotprod;

}  // namespace trine
