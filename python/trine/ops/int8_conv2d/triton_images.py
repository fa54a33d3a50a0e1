"""Images as the Triton kernels of `int8_conv2d` read them: bytes, quantised and padded once."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.ops import _triton
from trine.ops._triton import (
    magnitude_bits,
    not_finite,
    quantized_static,
    round_to_int,
    row_scaling,
)
from trine.ops.int8_conv2d.pack import BLOCK, QUAD

# Of an image, in each of which a program finds the largest magnitude; the interpreter runs them
# one after the other.
_PARTS = 2 if _triton.INTERPRETED else 64
_SIZE = 1024  # values that a program takes at a time


@triton.jit
def largest_kernel(x, most, VALUES, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """most[image, part]: the largest magnitude there, as the bits of a float."""
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    largest = tl.zeros([SIZE], tl.int32)
    for begin in range(part * SIZE, VALUES, PARTS * SIZE):
        at = begin + tl.arange(0, SIZE)
        value = tl.load(x + image * VALUES + at, mask=at < VALUES, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude_bits(value))
    tl.store(most + image * PARTS + part, tl.max(largest, 0))


@triton.jit
def quantize_images_kernel(
    x,
    most,
    q,
    scale,
    input_scale,
    zero_point,
    CHANNELS,
    HEIGHT,
    WIDTH,
    padding_h,
    padding_w,
    of_group,
    group_bytes,
    pixel_bytes,
    image_bytes,
    x_channel,
    x_pixel,
    STATIC: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """q[image]: the padding holds the zero point; channels that there are not meet weights of 0."""
    image = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    pixel, byte = at // pixel_bytes, at % pixel_bytes
    padded_width = WIDTH + 2 * padding_w
    row, column = pixel // padded_width - padding_h, pixel % padded_width - padding_w
    channel = byte // group_bytes * of_group + byte % group_bytes
    inside = (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
    inside &= (byte % group_bytes < of_group) & (channel < CHANNELS)
    from_x = image * CHANNELS * HEIGHT * WIDTH
    from_x += channel * x_channel + (row * WIDTH + column) * x_pixel
    value = tl.load(x + from_x, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.load(most + image * PARTS + tl.arange(0, PARTS)), 0)
    if STATIC:
        image_scale = tl.load(input_scale)
        zero = tl.zeros([], tl.float32)
        if HAS_ZERO_POINT:
            zero = tl.load(zero_point).to(tl.float32)
        finite = tl.where(not_finite(value) == 0, value, 0.0)
        rounded = quantized_static(finite, image_scale, zero)
        absmax = largest.to(tl.float32, bitcast=True)
        image_scale = tl.where(not_finite(absmax) == 0, image_scale, float("nan"))
    else:
        quantized, to_q, image_scale = row_scaling(largest)
        rounded = tl.where(quantized, round_to_int(value * to_q), 0)
    tl.store(q + image * image_bytes + at, rounded.to(tl.int8), mask=at < image_bytes)
    tl.store(scale + image, image_scale)


@dataclass(frozen=True)
class Images:
    """int8 [batch][height + 2 padding][width + 2 padding][groups][group_bytes], and their scales.

    Where every channel is convolved by itself there is one group, of all channels.
    """

    q: Tensor
    scale: Tensor
    group_bytes: int
    pixel_bytes: int
    row_bytes: int
    image_bytes: int


def quantize_images(
    x: Tensor,
    groups: int,
    depthwise: bool,
    padding: list[int],
    channels_last: bool,
    static: tuple[Tensor, Tensor | None] | None,
) -> Images:
    """Of x [B, C, H, W], or with `channels_last` [B, H, W, C]; `static` as for `quantize_rows`."""
    x = x.contiguous()
    batch, channels, height, width = x.movedim(3, 1).shape if channels_last else x.shape
    input_groups = 1 if depthwise else groups
    of_group = channels // input_groups
    multiple = BLOCK if depthwise else QUAD
    group_bytes = -(-of_group // multiple) * multiple
    pixel_bytes = input_groups * group_bytes
    row_bytes = (width + 2 * padding[1]) * pixel_bytes
    image_bytes = (height + 2 * padding[0]) * row_bytes
    q = x.new_empty(batch, image_bytes, dtype=torch.int8)
    scale = x.new_empty(batch, dtype=torch.float32)
    most = x.new_empty(batch, _PARTS, dtype=torch.int32)
    values = channels * height * width
    largest_kernel[(batch, _PARTS)](x, most, values, PARTS=_PARTS, SIZE=_SIZE)
    input_scale, zero_point = static or (None, None)
    quantize_images_kernel[(batch, triton.cdiv(image_bytes, _SIZE))](
        x,
        most,
        q,
        scale,
        input_scale,
        zero_point,
        channels,
        height,
        width,
        *padding,
        of_group,
        group_bytes,
        pixel_bytes,
        image_bytes,
        1 if channels_last else height * width,
        channels if channels_last else 1,
        STATIC=static is not None,
        HAS_ZERO_POINT=zero_point is not None,
        PARTS=_PARTS,
        SIZE=_SIZE,
        **_triton.LAUNCH,
    )
    return Images(q, scale, group_bytes, pixel_bytes, row_bytes, image_bytes)
