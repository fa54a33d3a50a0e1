#include <cmath>

#include "common/dispatch.h"
#include "common/torch_linear.h"
#include "int8_conv2d/int8_conv2d.h"
#include "int8_linear/torch.h"

namespace trine {
namespace {

constexpr const char* kOp = "int8_conv2d";

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

struct Pair {
  int64_t h, w;
};

Pair read_pair(const std::vector<int64_t>& values, const char* name, int64_t least) {
  check(values.size() == 2 && values[0] >= least && values[1] >= least, kOp, ": ", name,
        " must be two whole numbers of at least ", least);
  return {values[0], values[1]};
}

// The kernel size and the channels of a group that a packed weight is for, checked against x.
void read_weight(const Tensor& packed, int64_t groups, Conv& conv) {
  check(packed.scalar_type() == ScalarType::Char, kOp, ": packed_weight must be int8");
  check(groups >= 1 && conv.channels % groups == 0 && conv.out_channels % groups == 0, kOp,
        ": groups = ", groups, " must divide the ", conv.channels, " input and the ",
        conv.out_channels, " output channels");
  conv.groups = groups;
  conv.depthwise = groups > 1 && groups == conv.channels && groups == conv.out_channels;
  const int64_t of_group = conv.channels / groups;
  const int64_t quads = (of_group + kConvQuad - 1) / kConvQuad;
  const int64_t first = conv.depthwise ? 0 : 1;
  const bool has_shape = packed.dim() == (conv.depthwise ? 4 : 7);
  check(has_shape && packed.size(first) == conv.blocks(), kOp, ": packed_weight does not fit x of ",
        conv.channels, " channels, weight_scale of ", conv.out_channels, " and groups = ", groups,
        "; pack the weight with trine.ops.pack_conv2d");
  conv.kernel_h = packed.size(first + 1);
  conv.kernel_w = packed.size(first + 2);
  const bool fits = conv.depthwise
                        ? packed.size(3) == kConvBlock
                        : packed.size(0) == groups && packed.size(4) == quads &&
                              packed.size(5) == kConvBlock && packed.size(6) == kConvQuad;
  check(fits && conv.taps() > 0, kOp, ": packed_weight does not fit x of ", conv.channels,
        " channels in ", groups, " groups; pack the weight with trine.ops.pack_conv2d");
  check(of_group * conv.taps() <= kConvMaxPatch, kOp, ": a patch of ", of_group * conv.taps(),
        " values exceeds ", kConvMaxPatch, ", beyond which int32 sums could overflow");
  conv.input_groups = conv.depthwise ? 1 : groups;
  conv.group_bytes = conv.depthwise ? conv.blocks() * kConvBlock : quads * kConvQuad;
  conv.pixel_bytes = conv.input_groups * conv.group_bytes;
}

int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                    int64_t dilation) {
  const int64_t spare = size + 2 * padding - dilation * (kernel - 1) - 1;
  check(spare >= 0, kOp, ": the kernel spans ", dilation * (kernel - 1) + 1, " pixels, the padded ",
        "input has ", size + 2 * padding);
  return spare / stride + 1;
}

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
  const int64_t weight_blocks = conv.depthwise ? conv.blocks() : conv.groups * conv.blocks();
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
    for (int64_t i = begin; i < end; ++i) kernel.fill_row(conv, i / rows, i % rows, kernel.offset);
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
  conv.type = float_type(x, kOp, "x");
  check(x.dim() == 4, kOp, ": x must be [batch, channels, height, width]; it has ", x.dim(),
        " dimensions");
  const int64_t batch = x.size(0), first = channels_last ? 1 : 2;
  conv.channels = x.size(channels_last ? 3 : 1);
  conv.height = x.size(first), conv.width = x.size(first + 1);
  check(weight_scale.dim() == 1 && weight_scale.scalar_type() == ScalarType::Float, kOp,
        ": weight_scale must be float32 [N], one scale per output channel");
  conv.out_channels = weight_scale.size(0);
  read_weight(packed_weight, groups, conv);
  const Pair strides = read_pair(stride, "stride", 1), pads = read_pair(padding, "padding", 0),
             dilations = read_pair(dilation, "dilation", 1);
  conv.stride_h = strides.h, conv.stride_w = strides.w;
  conv.padding_h = pads.h, conv.padding_w = pads.w;
  conv.dilation_h = dilations.h, conv.dilation_w = dilations.w;
  conv.out_height = output_size(conv.height, conv.kernel_h, strides.h, pads.h, dilations.h);
  conv.out_width = output_size(conv.width, conv.kernel_w, strides.w, pads.w, dilations.w);
  conv.row_bytes = (conv.width + 2 * pads.w) * conv.pixel_bytes;
  conv.image_bytes = (conv.height + 2 * pads.h) * conv.row_bytes;
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
  const int64_t area = conv.height * conv.width, out_area = conv.out_height * conv.out_width;
  conv.x = input.const_data_ptr();
  conv.x_channel = channels_last ? 1 : area;
  conv.x_pixel = channels_last ? conv.channels : 1;
  Tensor y = channels_last
                 ? new_tensor(x, {batch, conv.out_height, conv.out_width, conv.out_channels})
                 : new_tensor(x, {batch, conv.out_channels, conv.out_height, conv.out_width});
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
