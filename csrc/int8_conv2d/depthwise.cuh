// Depthwise convolutions: every channel by itself.
//
// A warp computes 16 channels, whose weights lie side by side, of 32 output pixels: of a lane are
// four channels of four pixels, and a tap is a word of each pixel. The sum of one channel is a dot
// product (dp4a) with the weights of the other three masked out, so that no byte is widened: four
// masks and 16 products for 16 outputs.
//
// What bounds it: memory; the image is read from the caches once for each tap.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/memory.cuh"
#include "int8_conv2d/patches.cuh"

namespace trine {
namespace {

constexpr int kDepthwiseWarps = 8, kDepthwisePixels = 4;
constexpr int kLanesOfBlock = kConvBlock / kConvQuad;  // that share 16 channels
constexpr int kPixelsAtATime = kWarpThreads / kLanesOfBlock;
constexpr int kPixelsOfBlock = kDepthwiseWarps * kPixelsAtATime * kDepthwisePixels;

__global__ void __launch_bounds__(kDepthwiseWarps* kWarpThreads) depthwise_kernel(DeviceConv conv) {
  const ConvShape& shape = conv.shape;
  const int lane = int(threadIdx.x) % kWarpThreads, warp = int(threadIdx.x) / kWarpThreads;
  const auto blocks = uint32_t(conv.blocks);
  // Blocks of neighbouring channels come together: what lies side by side in memory.
  const uint32_t block = blockIdx.x % blocks;
  const int64_t first = int64_t(blockIdx.x / blocks) * kPixelsOfBlock +
                        warp * kPixelsAtATime * kDepthwisePixels + lane / kLanesOfBlock;
  const int64_t channel = block * kConvBlock + lane % kLanesOfBlock * kConvQuad;
  const uint8_t* weight =
      conv.linear.weight + block * conv.block_bytes + lane % kLanesOfBlock * kConvQuad;

  const int8_t* patch[kDepthwisePixels];
#pragma unroll
  for (int p = 0; p < kDepthwisePixels; ++p) {
    // Behind the last pixel the last one again; it is not stored.
    const int64_t m = first + p * kPixelsAtATime;
    const auto known = uint32_t(m < conv.linear.m ? m : conv.linear.m - 1);
    patch[p] = patch_of(conv, pixel_of(conv, known)) + channel;
  }
  int32_t sums[kDepthwisePixels][kConvQuad] = {};
  for (int64_t y = 0; y < shape.kernel_h; ++y)
    for (int64_t x = 0; x < shape.kernel_w; ++x, weight += kConvBlock) {
      const int64_t offset =
          y * shape.dilation_h * shape.row_bytes + x * shape.dilation_w * shape.pixel_bytes;
      uint32_t taps;
      load_global<4>(&taps, weight);
      uint32_t values[kDepthwisePixels];
#pragma unroll
      for (int p = 0; p < kDepthwisePixels; ++p) load_global<4>(&values[p], patch[p] + offset);
#pragma unroll
      for (int c = 0; c < int(kConvQuad); ++c) {
        const uint32_t tap = taps & 0xffu << 8 * c;
#pragma unroll
        for (int p = 0; p < kDepthwisePixels; ++p)
          sums[p][c] = __dp4a(int32_t(values[p]), int32_t(tap), sums[p][c]);
      }
    }

#pragma unroll
  for (int c = 0; c < int(kConvQuad); ++c) {
    const int64_t n = channel + c;
    if (n >= conv.linear.n) continue;
    const ColumnScaling scaling = column_scaling(conv.linear, n);
#pragma unroll
    for (int p = 0; p < kDepthwisePixels; ++p) {
      const int64_t m = first + p * kPixelsAtATime;
      if (m >= conv.linear.m) continue;
      const Pixel pixel = pixel_of(conv, uint32_t(m));
      write_float(conv.linear.y, conv.linear.type, place_of(conv, pixel) + n * conv.y_channel,
                  finished<0>(conv.linear, sums[p][c], pixel.image, scaling));
    }
  }
}

void depthwise_conv2d(const DeviceConv& conv, cudaStream_t stream) {
  const int64_t spans = (conv.linear.m + kPixelsOfBlock - 1) / kPixelsOfBlock;
  launch("int8_conv2d", depthwise_kernel, {spans * conv.blocks, kDepthwiseWarps * kWarpThreads},
         stream, conv);
}

}  // namespace
}  // namespace trine
