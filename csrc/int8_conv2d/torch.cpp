#include "int8_conv2d/torch.h"
#include "common/dispatch.h"
#include "int8_linear/torch.h"

namespace trine {
namespace {

constexpr const char* kOp = kInt8Conv2d;

struct Row {
  Isa needs;
  const Int8Conv2dKernel* kernel;
};

constexpr Row kKernels[] = {
#ifdef TRINE_X86
    {Isa::avx512vnni, &int8_conv2d_avx512vnni},
    {Isa::avx2, &int8_conv2d_avx2},
#elif defined(TRINE_ARM64)
    {Isa::dotprod, &int8_conv2d_dotprod},
#endif
    {Isa::scalar, &int8_conv2d_scalar},
};
[[maybe_unused]] const bool announced = announce(kOp, kKernels);

// Scale and factor of each image.
void find_scales(const Int8Conv2dKernel& kernel, const Conv& conv, int64_t batch,
                 const std::optional<StaticInput>& fixed, float* scale, float* factor) {
  const int64_t values = conv.channels * conv.height * conv.width;
  const int64_t parts = std::min<int64_t>(values / 16384 + 1, 64);
  const int64_t bytes = kFloatBytes[static_cast<int>(conv.type)];
  const Scratch memory(batch * parts * 4);
  uint32_t* most = memory.data<uint32_t>();
  torch::stable::parallel_for(0, batch * parts, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = values * (i % parts) / parts, to = values * (i % parts + 1) / parts;
      const char* x = static_cast<const char*>(conv.x) + (i / parts * values + from) * bytes;
      most[i] = kernel.largest(x, conv.type, to - from);
    }
  });
  for (int64_t image = 0; image < batch; ++image) {
    const uint32_t bits = *std::max_element(most + image * parts, most + (image + 1) * parts);
    const float absmax = from_bits(bits);
    const bool finite = std::isfinite(absmax);
    if (fixed.has_value()) {
      factor[image] = fixed->scale;
      scale[image] = finite ? fixed->scale : std::numeric_limits<float>::quiet_NaN();
    } else {  // the rule of quantize_rows
      const bool zero = absmax < 0x1p-120f;
      factor[image] = zero ? 0.0f : 127.0f / absmax;
      scale[image] = !finite ? std::numeric_limits<float>::quiet_NaN()
                     : zero  ? 0.0f
                             : absmax / 127.0f;
    }
  }
}

void convolve(const Int8Conv2dKernel& kernel, Conv& conv, int64_t batch,
              const std::optional<StaticInput>& fixed) {
  const int64_t weight_blocks = conv.weight_blocks();
  const Scratch scales(2 * batch * 4), sums(weight_blocks * kConvBlock * 4);
  const Scratch images(batch * conv.image_bytes);
  float* scale = scales.data<float>();
  find_scales(kernel, conv, batch, fixed, scale, scale + batch);
  conv.scale = scale;
  conv.factor = scale + batch;
  conv.weight_sum = sums.data<int32_t>();
  conv.images = images.data<uint8_t>();

  const int64_t rows = conv.height + 2 * conv.padding_h;
  const int64_t row_grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(conv.row_bytes, 1));
  torch::stable::parallel_for(0, batch * rows, row_grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t first = i % rows, last = std::min(rows, first + end - i);
      kernel.fill_rows(conv, i / rows, first, last, kernel.offset);
      i += last - first;
    }
  });
  const int64_t sum_grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(conv.block_bytes(), 1));
  torch::stable::parallel_for(0, weight_blocks, sum_grain, [&](int64_t begin, int64_t end) {
    kernel.sum_weights(conv, begin, end);
  });

  // A part: 48 pixels (a multiple of every tile) by four blocks of one group. Neighbours share the
  // weights, which then stay in L2.
  constexpr int64_t kPixels = 48, kBlocks = 4;
  const int64_t pixels = conv.out_height * conv.out_width;
  const int64_t spans = (pixels + kPixels - 1) / kPixels;
  const int64_t in_group = (conv.blocks() + kBlocks - 1) / kBlocks;
  const int64_t groups = conv.depthwise ? 1 : conv.groups;
  const int64_t work = kPixels * kBlocks * conv.block_bytes();  // multiplications, about
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 20) / std::max<int64_t>(work, 1));
  torch::stable::parallel_for(
      0, batch * groups * in_group * spans, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t span = i % spans, column = i / spans % in_group;
          const int64_t group = i / spans / in_group % groups;
          const ConvPart part{i / spans / in_group / groups,
                              group,
                              column * kBlocks,
                              std::min(column * kBlocks + kBlocks, conv.blocks()),
                              span * kPixels,
                              std::min(span * kPixels + kPixels, pixels)};
          kernel.run(conv, part, kernel.offset);
        }
      });
}

Tensor int8_conv2d_cpu(const Tensor& x, const Tensor& packed_weight, const Tensor& weight_scale,
                       const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                       const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                       int64_t groups, bool channels_last, const std::optional<Tensor>& input_scale,
                       const std::optional<Tensor>& input_zero_point) {
  Conv conv{};
  static_cast<ConvShape&>(conv) = read_conv_shape(x, packed_weight, weight_scale, stride, padding,
                                                  dilation, groups, channels_last);
  conv.type = float_type(x, kOp, "x");
  const int64_t batch = x.size(0);
  const auto fixed = read_static_input(kOp, input_scale, input_zero_point);
  conv.static_scale = fixed.has_value();
  conv.zero_point = fixed.has_value() ? fixed->zero_point : 0;

  const Tensor weight = as_contiguous(packed_weight);
  const Float32Vector scale(weight_scale, kOp, "weight_scale");
  const auto bias_values = read_bias(bias, conv.out_channels, kOp);
  conv.weight = static_cast<const int8_t*>(weight.const_data_ptr());
  conv.weight_scale = scale.data();
  conv.bias = bias_values.has_value() ? bias_values->data() : nullptr;

  const Tensor input = as_contiguous(x);
  const int64_t area = conv.height * conv.width, out_area = conv.out_pixels();
  conv.x = input.const_data_ptr();
  conv.x_channel = channels_last ? 1 : area;
  conv.x_pixel = channels_last ? conv.channels : 1;
  Tensor y = new_tensor(x, output_sizes(conv, batch, channels_last));
  conv.y = y.mutable_data_ptr();
  conv.y_channel = channels_last ? 1 : out_area;
  conv.y_pixel = channels_last ? conv.out_channels : 1;
  if (batch * conv.out_channels * out_area > 0)
    convolve(*select(kKernels).kernel, conv, batch, fixed);
  return y;
}

}  // namespace
}  // namespace trine

STABLE_TORCH_LIBRARY_FRAGMENT(trine, m) {
  // x [B, C, H, W] and the result [B, N, H, W]; with channels_last [B, H, W, C] and [B, H, W, N].
  m.def(
      "int8_conv2d(Tensor x, Tensor packed_weight, Tensor weight_scale, Tensor? bias, int[] "
      "stride, "
      "int[] padding, int[] dilation, int groups, bool channels_last, Tensor? input_scale=None, "
      "Tensor? "
      "input_zero_point=None) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(trine, CPU, m) {
  m.impl("int8_conv2d", TORCH_BOX(&trine::int8_conv2d_cpu));
}
