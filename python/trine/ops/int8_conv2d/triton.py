"""`int8_conv2d` on Triton: the formula and its roundings are those of the compiled kernels.

An image is quantised once, into padded bytes. A patch is then a list of places in it, the same for
every pixel but for where they begin, from which a product gathers its operand.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.ops import _triton
from trine.ops._triton import narrow, rows_and_columns, scaled_sums
from trine.ops.int8_conv2d import _fake as check_and_allocate
from trine.ops.int8_conv2d.triton_images import quantize_images


@triton.jit
def _patches(m, OUT_HEIGHT, OUT_WIDTH, image_bytes, step_h, step_w):
    """Of output pixels m: their images, their places in these, and where their patches begin."""
    image, pixel = m // (OUT_HEIGHT * OUT_WIDTH), m % (OUT_HEIGHT * OUT_WIDTH)
    begin = image.to(tl.int64) * image_bytes
    begin += (pixel // OUT_WIDTH).to(tl.int64) * step_h + pixel % OUT_WIDTH * step_w
    return image, pixel, begin


@triton.jit
def _store(
    y,
    acc,
    x_scale,
    weight_scale,
    column_minus,
    bias,
    image,
    pixel,
    channel,
    IMAGES,
    CHANNELS,
    image_values,
    y_channel,
    y_pixel,
    HAS_MINUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    known = channel < CHANNELS
    if HAS_MINUS:
        acc -= tl.load(column_minus + channel, mask=known, other=0)[None, :]
    scaled = scaled_sums(acc, x_scale, weight_scale, image, channel, IMAGES, CHANNELS)
    if HAS_BIAS:
        scaled = scaled + tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    at = (image.to(tl.int64) * image_values + pixel.to(tl.int64) * y_pixel)[:, None]
    at += channel.to(tl.int64)[None, :] * y_channel
    inside = (image < IMAGES)[:, None] & known[None, :]
    tl.store(y + at, narrow(scaled, y.dtype.element_ty), mask=inside)


@triton.jit
def int8_conv2d_kernel(
    q,
    weight,
    y,
    x_scale,
    weight_scale,
    column_minus,
    bias,
    IMAGES,
    CHANNELS,
    K,
    OUT_HEIGHT,
    OUT_WIDTH,
    groups,
    kernel_w,
    group_bytes,
    image_bytes,
    step_h,
    step_w,
    tap_h,
    tap_w,
    image_values,
    y_channel,
    y_pixel,
    row_bucket,
    HAS_MINUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Output pixels by the output channels of a group, over the K values of a patch.

    `step` and `tap`: bytes from the patch of an output pixel to that of the next, down and to the
    right, and from a tap of the kernel to the next.
    """
    group = tl.program_id(1)
    M, N = IMAGES * OUT_HEIGHT * OUT_WIDTH, CHANNELS // groups
    m, n = rows_and_columns(M, N, BLOCK_M, BLOCK_N)
    image, pixel, begin = _patches(m, OUT_HEIGHT, OUT_WIDTH, image_bytes, step_h, step_w)
    patches = q + (begin + group * group_bytes)[:, None]
    block = (group * tl.cdiv(N, 16) + n // 16).to(tl.int64)
    columns = weight + (block * 16 * K + n % 16 * 4)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        tap = k // group_bytes
        place = (tap // kernel_w).to(tl.int64) * tap_h + tap % kernel_w * tap_w + k % group_bytes
        a = tl.load(patches + place[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0)
        quad = (k // 4 * 64 + k % 4)[:, None]
        b = tl.load(columns + quad, mask=(n < N)[None, :] & (k < K)[:, None], other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    channel = tl.where(n < N, group * N + n, CHANNELS)
    _store(
        y,
        acc,
        x_scale,
        weight_scale,
        column_minus,
        bias,
        image,
        pixel,
        channel,
        IMAGES,
        CHANNELS,
        image_values,
        y_channel,
        y_pixel,
        HAS_MINUS,
        HAS_BIAS,
    )


@triton.jit
def depthwise_kernel(
    q,
    weight,
    y,
    x_scale,
    weight_scale,
    column_minus,
    bias,
    IMAGES,
    CHANNELS,
    OUT_HEIGHT,
    OUT_WIDTH,
    kernel_h,
    kernel_w,
    image_bytes,
    step_h,
    step_w,
    tap_h,
    tap_w,
    image_values,
    y_channel,
    y_pixel,
    HAS_MINUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Every channel by itself, tap after tap; its weights lie sixteen channels side by side."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    image, pixel, begin = _patches(m, OUT_HEIGHT, OUT_WIDTH, image_bytes, step_h, step_w)
    known = (channel < CHANNELS)[None, :]
    inside = (image < IMAGES)[:, None] & known
    values = q + (begin[:, None] + channel[None, :])
    taps = weight + (channel // 16 * 16 * kernel_h * kernel_w + channel % 16)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for tap in range(0, kernel_h * kernel_w):
        place = (tap // kernel_w).to(tl.int64) * tap_h + tap % kernel_w * tap_w
        a = tl.load(values + place, mask=inside, other=0).to(tl.int32)
        acc += a * tl.load(taps + tap * 16, mask=known, other=0).to(tl.int32)
    _store(
        y,
        acc,
        x_scale,
        weight_scale,
        column_minus,
        bias,
        image,
        pixel,
        channel,
        IMAGES,
        CHANNELS,
        image_values,
        y_channel,
        y_pixel,
        HAS_MINUS,
        HAS_BIAS,
    )


_tuned = _triton.tuned(
    int8_conv2d_kernel, "BLOCK_K", ("row_bucket", "CHANNELS", "groups", "K", "kernel_w")
)
# Pixels and channels: neighbouring lanes have neighbouring channels, which lie side by side.
_DEPTHWISE_TILE = {"BLOCK_M": 32, "BLOCK_N": 32}


def int8_conv2d(
    x: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    channels_last: bool,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
) -> Tensor:
    options = (stride, padding, dilation, groups, channels_last)
    static = (input_scale, input_zero_point)
    y = check_and_allocate(x, packed_weight, weight_scale, bias, *options, *static)
    if y.numel() == 0:
        return y
    depthwise = packed_weight.dim() == 4
    given = None if input_scale is None else static
    images = quantize_images(x, groups, depthwise, padding, channels_last, given)
    weight, channels = packed_weight.contiguous(), weight_scale.shape[0]
    batch, out_height, out_width = y.shape[0], *(y.shape[1:3] if channels_last else y.shape[2:])
    area = out_height * out_width
    minus = None
    if input_zero_point is not None:
        sums = _sums_of_channels(weight, channels)
        minus = (sums * input_zero_point).to(torch.int32)
    kernel_h, kernel_w = weight.shape[1:3] if depthwise else weight.shape[2:4]
    tensors = (images.q, weight, y, images.scale, weight_scale.contiguous(), minus)
    tensors += (bias if bias is None else bias.contiguous(),)
    places = (stride[0] * images.row_bytes, stride[1] * images.pixel_bytes)
    places += (dilation[0] * images.row_bytes, dilation[1] * images.pixel_bytes)
    places += (channels * area, *((1, channels) if channels_last else (area, 1)))
    flags = {"HAS_MINUS": minus is not None, "HAS_BIAS": bias is not None}
    if depthwise:
        tile = _DEPTHWISE_TILE
        sizes = (batch, channels, out_height, out_width, kernel_h, kernel_w, images.image_bytes)
        grid = (triton.cdiv(batch * area, tile["BLOCK_M"]), triton.cdiv(channels, tile["BLOCK_N"]))
        depthwise_kernel[grid](*tensors, *sizes, *places, **flags, **tile, **_triton.LAUNCH)
        return y
    k = kernel_h * kernel_w * images.group_bytes
    sizes = (batch, channels, k, out_height, out_width, groups, kernel_w)
    tiles = _triton.tiles_of(batch * area, channels // groups)
    _tuned[lambda meta: (*tiles(meta), groups)](
        *tensors,
        *sizes,
        images.group_bytes,
        images.image_bytes,
        *places,
        _triton.row_bucket(batch * area),
        **flags,
        **_triton.LAUNCH,
    )
    return y


def _sums_of_channels(weight: Tensor, channels: int) -> Tensor:
    """The sum of each output channel's weights, int32 [N]."""
    if weight.dim() == 4:
        return weight.sum((1, 2), dtype=torch.int32).flatten()[:channels]
    groups = weight.shape[0]
    sums = weight.sum((2, 3, 4, 6), dtype=torch.int32).flatten(1)
    return sums[:, : channels // groups].flatten()
