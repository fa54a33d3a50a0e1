// What int8_conv2d checks alike on every device. Only torch*.cpp files include this.
#pragma once

#include <vector>

#include "common/torch_linear.h"
#include "int8_conv2d/int8_conv2d.h"

namespace trine {

inline constexpr const char* kInt8Conv2d = "int8_conv2d";

struct ConvPair {
  int64_t h, w;
};

inline ConvPair read_pair(const std::vector<int64_t>& values, const char* name, int64_t least) {
  check(values.size() == 2 && values[0] >= least && values[1] >= least, kInt8Conv2d, ": ", name,
        " must be two whole numbers of at least ", least);
  return {values[0], values[1]};
}

// The kernel size and the channels of a group that a packed weight is for, checked against x.
inline void read_conv_weight(const Tensor& packed, int64_t groups, ConvShape& conv) {
  check(packed.scalar_type() == ScalarType::Char, kInt8Conv2d, ": packed_weight must be int8");
  check(groups >= 1 && conv.channels % groups == 0 && conv.out_channels % groups == 0, kInt8Conv2d,
        ": groups = ", groups, " must divide the ", conv.channels, " input and the ",
        conv.out_channels, " output channels");
  conv.groups = groups;
  conv.depthwise = groups > 1 && groups == conv.channels && groups == conv.out_channels;
  const int64_t of_group = conv.channels / groups;
  const int64_t quads = (of_group + kConvQuad - 1) / kConvQuad;
  const int64_t first = conv.depthwise ? 0 : 1;
  const bool has_shape = packed.dim() == (conv.depthwise ? 4 : 7);
  check(has_shape && packed.size(first) == conv.blocks(), kInt8Conv2d,
        ": packed_weight does not fit x of ", conv.channels, " channels, weight_scale of ",
        conv.out_channels, " and groups = ", groups,
        "; pack the weight with trine.ops.pack_conv2d");
  conv.kernel_h = packed.size(first + 1);
  conv.kernel_w = packed.size(first + 2);
  const bool fits = conv.depthwise
                        ? packed.size(3) == kConvBlock
                        : packed.size(0) == groups && packed.size(4) == quads &&
                              packed.size(5) == kConvBlock && packed.size(6) == kConvQuad;
  check(fits && conv.taps() > 0, kInt8Conv2d, ": packed_weight does not fit x of ", conv.channels,
        " channels in ", groups, " groups; pack the weight with trine.ops.pack_conv2d");
  check(of_group * conv.taps() <= kConvMaxPatch, kInt8Conv2d, ": a patch of ",
        of_group * conv.taps(), " values exceeds ", kConvMaxPatch,
        ", beyond which int32 sums could overflow");
  conv.input_groups = conv.depthwise ? 1 : groups;
  conv.group_bytes = conv.depthwise ? conv.blocks() * kConvBlock : quads * kConvQuad;
  conv.pixel_bytes = conv.input_groups * conv.group_bytes;
}

inline int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                           int64_t dilation) {
  const int64_t spare = size + 2 * padding - dilation * (kernel - 1) - 1;
  check(spare >= 0, kInt8Conv2d, ": the kernel spans ", dilation * (kernel - 1) + 1,
        " pixels, the padded ", "input has ", size + 2 * padding);
  return spare / stride + 1;
}

// The sizes of a call. x [B, C, H, W]; with `channels_last` [B, H, W, C].
inline ConvShape read_conv_shape(const Tensor& x, const Tensor& packed_weight,
                                 const Tensor& weight_scale, const std::vector<int64_t>& stride,
                                 const std::vector<int64_t>& padding,
                                 const std::vector<int64_t>& dilation, int64_t groups,
                                 bool channels_last) {
  ConvShape conv{};
  float_type(x, kInt8Conv2d, "x");
  check(x.dim() == 4, kInt8Conv2d, ": x must be [batch, channels, height, width]; it has ", x.dim(),
        " dimensions");
  const int64_t first = channels_last ? 1 : 2;
  conv.channels = x.size(channels_last ? 3 : 1);
  conv.height = x.size(first), conv.width = x.size(first + 1);
  check(weight_scale.dim() == 1 && weight_scale.scalar_type() == ScalarType::Float, kInt8Conv2d,
        ": weight_scale must be float32 [N], one scale per output channel");
  conv.out_channels = weight_scale.size(0);
  read_conv_weight(packed_weight, groups, conv);
  const ConvPair strides = read_pair(stride, "stride", 1), pads = read_pair(padding, "padding", 0),
                 dilations = read_pair(dilation, "dilation", 1);
  conv.stride_h = strides.h, conv.stride_w = strides.w;
  conv.padding_h = pads.h, conv.padding_w = pads.w;
  conv.dilation_h = dilations.h, conv.dilation_w = dilations.w;
  conv.out_height = output_size(conv.height, conv.kernel_h, strides.h, pads.h, dilations.h);
  conv.out_width = output_size(conv.width, conv.kernel_w, strides.w, pads.w, dilations.w);
  conv.row_bytes = (conv.width + 2 * pads.w) * conv.pixel_bytes;
  conv.image_bytes = (conv.height + 2 * pads.h) * conv.row_bytes;
  return conv;
}

inline std::vector<int64_t> output_sizes(const ConvShape& conv, int64_t batch, bool channels_last) {
  if (channels_last) return {batch, conv.out_height, conv.out_width, conv.out_channels};
  return {batch, conv.out_channels, conv.out_height, conv.out_width};
}

}  // namespace trine
