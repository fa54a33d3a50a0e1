// Runs int8_conv2d's CUDA kernels on the case on standard input. Arguments: the schedule's seed,
// the device's compute capability.
//
// A case: type of x and y, batch, channels, height, width, output channels, groups, kernel, stride,
// padding and dilation (height and width of each), 1 if channels lie together, 1 if static, type of
// the bias or -1; then x, packed weight, weight scales, bias, input scale, zero point. The answer:
// y.
#include <cstdlib>

#include "common/cuda/launch.cuh"
#include "driver.h"
#include "emulator.h"
#include "int8_conv2d/cuda.h"

using cuda_on_cpu::GuardedBuffer, cuda_on_cpu::read_number;

namespace {

int64_t whole(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

trine::ConvShape read_shape() {
  trine::ConvShape shape = {};
  for (int64_t* number :
       {&shape.channels, &shape.height, &shape.width, &shape.out_channels, &shape.groups,
        &shape.kernel_h, &shape.kernel_w, &shape.stride_h, &shape.stride_w, &shape.padding_h,
        &shape.padding_w, &shape.dilation_h, &shape.dilation_w})
    *number = read_number();
  const auto out_size = [](int64_t size, int64_t kernel, int64_t dilation, int64_t stride) {
    return (size - dilation * (kernel - 1) - 1) / stride + 1;
  };
  const int64_t height = shape.height + 2 * shape.padding_h;
  const int64_t width = shape.width + 2 * shape.padding_w;
  shape.out_height = out_size(height, shape.kernel_h, shape.dilation_h, shape.stride_h);
  shape.out_width = out_size(width, shape.kernel_w, shape.dilation_w, shape.stride_w);
  const int64_t groups = shape.groups;
  shape.depthwise = groups > 1 && groups == shape.channels && groups == shape.out_channels;
  shape.input_groups = shape.depthwise ? 1 : groups;
  shape.group_bytes = shape.depthwise ? whole(shape.channels, trine::kConvBlock)
                                      : whole(shape.channels / groups, trine::kConvQuad);
  shape.pixel_bytes = shape.input_groups * shape.group_bytes;
  shape.row_bytes = width * shape.pixel_bytes;
  shape.image_bytes = height * shape.row_bytes;
  return shape;
}

}  // namespace

int main(int, char** arguments) {
  cuda_on_cpu::set_seed(std::strtoull(arguments[1], nullptr, 10));
  trine::emulated_capability = std::atoi(arguments[2]);
  const auto type = static_cast<trine::FloatType>(read_number());
  const auto size = std::size_t(trine::kFloatBytes[static_cast<int>(type)]);
  const int64_t batch = read_number();
  const trine::ConvShape shape = read_shape();
  const bool last = read_number() != 0, fixed = read_number() != 0;
  const int64_t bias_type = read_number();
  const int64_t n = shape.out_channels, pixels = batch * shape.out_pixels();
  const int64_t values = batch * shape.channels * shape.height * shape.width;
  const auto weight_bytes = std::size_t(shape.weight_blocks() * shape.block_bytes());

  GuardedBuffer x("x", std::size_t(values) * size, 16);
  GuardedBuffer weight("the weight", weight_bytes, 16);
  GuardedBuffer weight_scale("the weight scales", std::size_t(n) * 4, 4);
  const std::size_t bias_size = bias_type < 0 ? 0 : std::size_t(trine::kFloatBytes[bias_type]);
  GuardedBuffer bias("the bias", std::size_t(n) * bias_size, 2);
  GuardedBuffer input_scale("the input scale", 4, 4), zero_point("the zero point", 4, 4);
  GuardedBuffer y("y", std::size_t(pixels * n) * size, size);
  GuardedBuffer q("the images", std::size_t(batch * shape.image_bytes), 16);
  GuardedBuffer scale("the scales of the images", std::size_t(batch) * 4, 4);
  GuardedBuffer most("the largest magnitudes", std::size_t(batch * trine::kConvMostParts) * 4, 4);
  GuardedBuffer minus("the column terms", std::size_t(n) * 4, 4);
  for (GuardedBuffer* input : {&x, &weight, &weight_scale, &bias}) input->read();
  if (fixed) input_scale.read(), zero_point.read();

  trine::ImagesToQuantize images = {};
  images.x = x.data<void>();
  images.type = type;
  images.x_channel = last ? 1 : shape.height * shape.width;
  images.x_pixel = last ? shape.channels : 1;
  if (fixed) images.input_scale = input_scale.data<float>();
  if (fixed) images.zero_point = zero_point.data<int32_t>();
  images.most = most.data<uint32_t>();
  images.q = q.data<uint8_t>();
  images.scale = scale.data<float>();
  trine::quantize_images_cuda(shape, batch, images, nullptr);

  trine::DeviceConv conv = trine::device_conv(shape, batch);
  conv.linear.q = q.data<int8_t>();
  conv.linear.x_scale = images.scale;
  conv.linear.weight = weight.data<uint8_t>();
  conv.linear.weight_scale = weight_scale.data<float>();
  conv.linear.y = y.data<void>();
  conv.linear.type = type;
  if (bias_type >= 0) {
    conv.linear.bias = bias.data<void>();
    conv.linear.bias_type = static_cast<trine::FloatType>(bias_type);
  }
  conv.y_channel = last ? 1 : shape.out_pixels();
  conv.y_pixel = last ? n : 1;
  if (fixed) {
    trine::conv_zero_point_cuda(conv, images.zero_point, minus.data<int32_t>(), nullptr);
    conv.linear.column_minus = minus.data<int32_t>();
  }
  trine::int8_conv2d_cuda(conv, nullptr);
  for (const GuardedBuffer* inner : {&q, &scale, &most, &minus}) inner->check_not_overrun();
  y.write();
}
