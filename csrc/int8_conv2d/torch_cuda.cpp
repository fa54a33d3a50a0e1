#include "common/cuda/torch_linear.h"
#include "int8_conv2d/cuda.h"
#include "int8_conv2d/torch.h"
#include "int8_linear/torch.h"

namespace trine {
namespace {

constexpr const char* kOp = kInt8Conv2d;

Tensor int8_conv2d_on_device(const Tensor& x, const Tensor& packed_weight,
                             const Tensor& weight_scale, const std::optional<Tensor>& bias,
                             const std::vector<int64_t>& stride,
                             const std::vector<int64_t>& padding,
                             const std::vector<int64_t>& dilation, int64_t groups,
                             bool channels_last, const std::optional<Tensor>& input_scale,
                             const std::optional<Tensor>& input_zero_point) {
  const DeviceGuard guard(x.get_device_index());
  const ConvShape shape = read_conv_shape(x, packed_weight, weight_scale, stride, padding, dilation,
                                          groups, channels_last);
  check_static_input(kOp, input_scale, input_zero_point);
  check_same_device(kOp, x, {&packed_weight, &weight_scale});
  for (const auto* optional : {&bias, &input_scale, &input_zero_point})
    if (optional->has_value()) check_same_device(kOp, x, {&**optional});
  const int64_t batch = x.size(0), pixels = batch * shape.out_pixels();
  check(pixels <= kConvMostPixels, kOp, ": ", pixels, " output pixels are more than the ",
        kConvMostPixels, " that a call on a GPU takes; split the batch");

  const Tensor weight = aligned_rows(packed_weight, kOp);
  const Tensor weight_scales = torch::stable::contiguous(weight_scale);
  DeviceConv conv = device_conv(shape, batch);
  std::optional<Tensor> bias_values;
  if (bias) {
    bias_values = torch::stable::contiguous(*bias);
    set_bias(conv.linear, *bias_values, kOp);
  }
  Tensor y = new_tensor(x, output_sizes(shape, batch, channels_last));
  if (pixels * shape.out_channels == 0) return y;

  const cudaStream_t stream = current_stream(x);
  const Tensor input = as_contiguous(x);
  const Tensor q = torch::stable::new_empty(x, {batch * shape.image_bytes}, ScalarType::Char);
  const Tensor scale = torch::stable::new_empty(x, {batch}, ScalarType::Float);
  const Tensor most = torch::stable::new_empty(x, {batch * kConvMostParts}, ScalarType::Int);
  ImagesToQuantize images = {};
  images.x = input.const_data_ptr();
  images.type = float_type(x, kOp, "x");
  images.x_channel = channels_last ? 1 : shape.height * shape.width;
  images.x_pixel = channels_last ? shape.channels : 1;
  if (input_scale) images.input_scale = static_cast<const float*>(input_scale->const_data_ptr());
  if (input_zero_point)
    images.zero_point = static_cast<const int32_t*>(input_zero_point->const_data_ptr());
  images.most = static_cast<uint32_t*>(most.mutable_data_ptr());
  images.q = static_cast<uint8_t*>(q.mutable_data_ptr());
  images.scale = static_cast<float*>(scale.mutable_data_ptr());
  quantize_images_cuda(shape, batch, images, stream);

  conv.linear.q = static_cast<const int8_t*>(q.const_data_ptr());
  conv.linear.x_scale = images.scale;
  conv.linear.weight = static_cast<const uint8_t*>(weight.const_data_ptr());
  conv.linear.weight_scale = static_cast<const float*>(weight_scales.const_data_ptr());
  conv.linear.y = y.mutable_data_ptr();
  conv.linear.type = images.type;
  conv.y_channel = channels_last ? 1 : shape.out_pixels();
  conv.y_pixel = channels_last ? shape.out_channels : 1;
  std::optional<Tensor> minus;
  if (images.zero_point != nullptr) {
    minus = torch::stable::new_empty(x, {shape.out_channels}, ScalarType::Int);
    auto* values = static_cast<int32_t*>(minus->mutable_data_ptr());
    conv_zero_point_cuda(conv, images.zero_point, values, stream);
    conv.linear.column_minus = values;
  }
  int8_conv2d_cuda(conv, stream);
  return y;
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_IMPL(trine, CUDA, m) {
  m.impl("int8_conv2d", TORCH_BOX(&trine::int8_conv2d_on_device));
}
