// int8_conv2d for every GPU from sm_80 on: the products of common/cuda/many_rows.cuh, whose rows of
// activations are patches, gathered from the quantised image unit by unit; nothing holds a patch.
//
// A unit is what lies side by side in one tap: 16 bytes, or where the channels of a group are not
// whole units, as in a first layer, a word of four.
//
// Tiles of y are 128 pixels by 128 output channels of a group; 64 x 64 where these would leave
// multiprocessors idle or a group has no more than 64, 128 x 32 where it has no more than 32.
#include "int8_conv2d/cuda.h"

#include "common/cuda/many_rows.cuh"
#include "int8_conv2d/depthwise.cuh"
#include "int8_conv2d/images.cuh"
#include "int8_conv2d/patches.cuh"

namespace trine {
namespace {

// Blocks of 16 channels lie in a stage as in the packed weight, four values of each channel after
// the other: 64 bytes for four k. Their units are swapped in pairs so that the four k's and eight
// channels of a fragment fall in all 32 banks.
struct ConvStage {
  using Operands = S8;
  using Sum = int32_t;
  static constexpr int kStageRowBytes = kStageK;
  static constexpr int kBlockBytes = int(kConvBlock) * kStageK;
  static constexpr int kQuadUnits = 4;  // of 16 bytes, in four k of a block

  static __device__ __forceinline__ int unit_offset_of(int unit) {
    const int quad = unit / kQuadUnits;
    return (quad * kQuadUnits + (unit % kQuadUnits ^ (quad & 2))) * kCopyBytes;
  }
  static __device__ __forceinline__ void fragments(uint32_t (&b)[2], const unsigned char* stage,
                                                   int n, int step, int lane) {
    const int column = n % int(kConvBlock) + lane / 4;
    const unsigned char* const block = stage + n / int(kConvBlock) * kBlockBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int quad = 8 * step + 4 * half + lane % 4;
      b[half] = *reinterpret_cast<const uint32_t*>(
          block + unit_offset_of(quad * kQuadUnits + column / 4) + column % 4 * 4);
    }
  }
};

template <class Tile, int kUnitBytes>
__global__ void __launch_bounds__(Tile::kThreads) conv_kernel(DeviceConv conv) {
  const ConvShape& shape = conv.shape;
  const auto in_group = uint32_t(shape.out_channels / shape.groups);
  const uint32_t row_tiles = (uint32_t(conv.linear.m) + Tile::kRows - 1) / Tile::kRows;
  const uint32_t tiles_of_group = (in_group + Tile::kColumns - 1) / Tile::kColumns;
  const RasterPosition tile =
      raster_position(blockIdx.x, row_tiles, tiles_of_group * uint32_t(shape.groups));
  const int64_t group = uint32_t(tile.column) / tiles_of_group;
  const int64_t n0 = uint32_t(tile.column) % tiles_of_group * Tile::kColumns;  // in the group
  const int64_t m0 = tile.row * Tile::kRows;

  // A thread gathers the same unit of several rows, which therefore share its place in a patch.
  constexpr int kUnits = kStageK / kUnitBytes;  // of a row
  constexpr int kRowsAtATime = Tile::kThreads / kUnits, kRounds = Tile::kRows / kRowsAtATime;
  const int unit = int(threadIdx.x) % kUnits, first_row = int(threadIdx.x) / kUnits;
  const int8_t* patch[kRounds];
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t m = m0 + first_row + round * kRowsAtATime;
    patch[round] = m < conv.linear.m
                       ? patch_of(conv, pixel_of(conv, uint32_t(m))) + group * shape.group_bytes
                       : nullptr;
  }
  const auto group_bytes = uint32_t(shape.group_bytes);
  const uint32_t values = uint32_t(conv.taps) * group_bytes;  // of a patch
  const int64_t blocks = conv.blocks, block_bytes = conv.block_bytes;
  const uint8_t* const weight = conv.linear.weight + group * blocks * block_bytes;

  const auto load = [&](unsigned char* a, unsigned char* b, int64_t step) {
    const uint32_t k = uint32_t(step) * kStageK + unit * kUnitBytes;
    const uint32_t tap = k / group_bytes;
    const int64_t offset = offset_of_tap(shape, tap) + (k - tap * group_bytes);
    const int at = unit * kUnitBytes;
#pragma unroll
    for (int round = 0; round < kRounds; ++round)
      copy_async<kUnitBytes>(
          shared_address(a + unit_offset(first_row + round * kRowsAtATime, at / kCopyBytes) +
                         at % kCopyBytes),
          patch[round] + offset, patch[round] != nullptr && k < values);
    constexpr int kBlockUnits = ConvStage::kBlockBytes / kCopyBytes;
#pragma unroll
    for (int i = int(threadIdx.x); i < Tile::kColumns * kStageK / kCopyBytes; i += Tile::kThreads) {
      const int64_t block = n0 / kConvBlock + i / kBlockUnits;
      const int64_t from = step * ConvStage::kBlockBytes + i % kBlockUnits * kCopyBytes;
      copy_async(shared_address(b + i / kBlockUnits * ConvStage::kBlockBytes +
                                ConvStage::unit_offset_of(i % kBlockUnits)),
                 weight + block * block_bytes + from, block < blocks && from < block_bytes);
    }
  };
  typename Tile::template Sums<int32_t> sums = {};
  multiply_stages<Tile, ConvStage>((values + kStageK - 1) / kStageK, load, sums, [](int64_t) {});

  struct Row {
    int64_t place, image;
  };
  struct Column {
    int64_t place;
    ColumnScaling scaling;
  };
  for_each_sum<Tile>(
      sums, conv.linear.m - m0, in_group - n0,
      [&](int m) {
        const Pixel pixel = pixel_of(conv, uint32_t(m0 + m));
        return Row{place_of(conv, pixel), pixel.image};
      },
      [&](int n) {
        const int64_t channel = group * in_group + n0 + n;
        return Column{channel * conv.y_channel, column_scaling(conv.linear, channel)};
      },
      [&](int32_t sum, const Row& row, const Column& column) {
        write_float(conv.linear.y, conv.linear.type, row.place + column.place,
                    finished<0>(conv.linear, sum, row.image, column.scaling));
      });
}

using LargeTile = LinearTile;           // 128 x 128
using SmallTile = TileShape<2, 2, 2>;   // 64 x 64
using NarrowTile = TileShape<4, 1, 2>;  // 128 x 32

template <class Tile>
int64_t tiles_of(const DeviceConv& conv) {
  const int64_t in_group = conv.shape.out_channels / conv.shape.groups;
  return (conv.linear.m + Tile::kRows - 1) / Tile::kRows * conv.shape.groups *
         ((in_group + Tile::kColumns - 1) / Tile::kColumns);
}

template <class Tile>
void convolve(const DeviceConv& conv, cudaStream_t stream) {
  const bool whole_units = conv.shape.group_bytes % kCopyBytes == 0;
  launch("int8_conv2d", whole_units ? conv_kernel<Tile, kCopyBytes> : conv_kernel<Tile, kConvQuad>,
         {tiles_of<Tile>(conv), Tile::kThreads,
          kManyRowsStages * Tile::template kStageBytes<ConvStage>},
         stream, conv);
}

// A block sums the weights of 16 output channels: thread t those of channel t % 16.
constexpr int kSumThreads = 256;

template <bool kDepthwise>
__global__ void __launch_bounds__(kSumThreads)
    conv_zero_point_kernel(DeviceConv conv, const int32_t* zero_point, int32_t* minus) {
  constexpr int kBytes = kDepthwise ? 1 : int(kConvQuad);  // of a channel, side by side
  const ConvShape& shape = conv.shape;
  const uint8_t* const block = conv.linear.weight + blockIdx.x * conv.block_bytes;
  int32_t sum = 0;
  for (int64_t at = int64_t(threadIdx.x) * kBytes; at < conv.block_bytes;
       at += kSumThreads * kBytes) {
    if constexpr (kDepthwise) {
      sum += int8_t(block[at]);
    } else {
      uint32_t four;
      load_global<4>(&four, block + at);
      sum = __dp4a(int32_t(four), 0x01010101, sum);
    }
  }
  TRINE_SHARED_ARRAY(int32_t, sums, kSumThreads);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kConvBlock) return;
  sum = 0;
#pragma unroll
  for (int i = 0; i < kSumThreads; i += int(kConvBlock)) sum += sums[i + threadIdx.x];
  const auto blocks = uint32_t(conv.blocks);
  const int64_t group = blockIdx.x / blocks;
  const int64_t n = blockIdx.x % blocks * kConvBlock + threadIdx.x;  // in the group
  const int64_t in_group = kDepthwise ? shape.out_channels : shape.out_channels / shape.groups;
  if (n < in_group) minus[group * in_group + n] = int32_t(uint32_t(sum) * uint32_t(*zero_point));
}

}  // namespace

void quantize_images_cuda(const ConvShape& shape, int64_t batch, const ImagesToQuantize& images,
                          cudaStream_t stream) {
  switch (images.type) {
    case FloatType::float32:
      return quantize_images<float>(shape, batch, images, stream);
    case FloatType::bfloat16:
      return quantize_images<bfloat16>(shape, batch, images, stream);
    case FloatType::float16:
      return quantize_images<float16>(shape, batch, images, stream);
  }
}

void int8_conv2d_cuda(const DeviceConv& conv, cudaStream_t stream) {
  const int64_t in_group = conv.shape.out_channels / conv.shape.groups;
  if (conv.shape.depthwise)
    depthwise_conv2d(conv, stream);
  else if (in_group <= NarrowTile::kColumns)
    convolve<NarrowTile>(conv, stream);
  else if (in_group <= SmallTile::kColumns || tiles_of<LargeTile>(conv) < multiprocessors())
    convolve<SmallTile>(conv, stream);
  else
    convolve<LargeTile>(conv, stream);
}

void conv_zero_point_cuda(const DeviceConv& conv, const int32_t* zero_point, int32_t* minus,
                          cudaStream_t stream) {
  launch("int8_conv2d",
         conv.shape.depthwise ? conv_zero_point_kernel<true> : conv_zero_point_kernel<false>,
         {conv.shape.weight_blocks(), kSumThreads}, stream, conv, zero_point, minus);
}

}  // namespace trine
