"""2-d convolution with int8 weights and int8 activations quantised inside."""

import torch
from torch import Tensor

from trine import _library  # noqa: F401  (registers the operator)
from trine.ops._checks import check_one_device, check_rows, explain_missing_kernel
from trine.ops._linear import in_autocast_dtype, needs_grad, without_autocast
from trine.ops.int8_conv2d.pack import pack_conv2d, packed_shape, unpack_conv2d

__all__ = ["int8_conv2d", "pack_conv2d", "unpack_conv2d"]

_op = torch.ops.trine.int8_conv2d.default
explain_missing_kernel("int8_conv2d")

_MAX_PATCH = 65536  # kConvMaxPatch in int8_conv2d.h gives the reason

Pair = tuple[int, int]


def int8_conv2d(
    x: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
) -> Tensor:
    """Convolve `x` with an INT8 weight: y = (acc * x_scale) * weight_scale + bias.

    Each image of x is quantised inside: by its largest magnitude (the rule of `quantize_rows`, an
    image being a row), or, where `input_scale` is given, with that scale and zero point for all, as
    ONNX's QuantizeLinear does. The image is written once as int8; patches are read from it and
    never written out. The int32 sums are exact; scaling is in fp32 and rounds once to x's dtype, so
    every backend gives the same bits. Gradients flow to x and bias (straight-through).

    Args:
        x: [B, C, H, W], float32, bfloat16 or float16; channels_last gives channels_last.
        packed_weight: int8, from `pack_conv2d` of [N, C / groups, kh, kw].
        weight_scale: float32 [N].
        bias: [N], floating, or None.
        stride, padding, dilation: of height and width. Padding is with 0.
        groups: as for torch.nn.functional.conv2d.
        input_scale: float32, one value; None quantises each image by itself.
        input_zero_point: int32, one value in [-128, 127]; only with `input_scale`.

    Returns:
        [B, N, H', W'] in x's dtype (under autocast, in its dtype). An image that holds NaN or
        infinity gives NaN.

    Raises:
        ValueError: shapes or dtypes that do not fit, a kernel that spans more than the padded
            image, patches of more than 65536 values (int32 could overflow), a packed weight or
            scale that requires a gradient.
    """
    x = in_autocast_dtype(x)
    options = (list(stride), list(padding), list(dilation), groups)
    weight = (packed_weight, weight_scale, input_scale, input_zero_point)
    if needs_grad(x, bias, *weight):
        if needs_grad(*weight):
            raise ValueError(
                "int8_conv2d gives no gradient to a packed weight or its scales; train a dense "
                "weight and pack it afterwards, or detach them"
            )
        return _WithGradient.apply(x, bias, options, *weight)
    return _run(x, bias, options, *weight)


def _run(
    x: Tensor,
    bias: Tensor | None,
    options: tuple,
    packed_weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
) -> Tensor:
    last = x.dim() == 4 and _is_channels_last(x)
    given = x.permute(0, 2, 3, 1) if last else x
    y = _op(
        given,
        packed_weight,
        weight_scale,
        bias,
        *options,
        last,
        input_scale,
        input_zero_point,
    )
    return y.permute(0, 3, 1, 2) if last else y


def _is_channels_last(x: Tensor) -> bool:
    """As torch does, by the strides where both layouts fit (one channel)."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return False
    return not x.is_contiguous() or (x.stride(1) == 1 and x.shape[2:].numel() > 1)


class _WithGradient(torch.autograd.Function):
    """The gradients of the plain convolution at the dequantised weight, in float32."""

    @staticmethod
    def forward(ctx, x, bias, options, *weight):
        y = _run(x, bias, options, *weight)  # first, because it checks everything
        ctx.options, ctx.x_shape, ctx.x_dtype = options, x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(*weight[:2])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        grad, grad_x, grad_bias = grad_y.float(), None, None
        with without_autocast(grad):
            if ctx.needs_input_grad[0]:
                packed, scale = ctx.saved_tensors
                stride, padding, dilation, groups = ctx.options
                kernel = packed.shape[1:3] if packed.dim() == 4 else packed.shape[2:4]
                shape = (len(scale), ctx.x_shape[1] // groups, *kernel)
                dense = unpack_conv2d(packed, shape) * scale[:, None, None, None]
                grad_x = torch.nn.grad.conv2d_input(
                    ctx.x_shape, dense, grad, stride, padding, dilation, groups
                ).to(ctx.x_dtype)
            if ctx.needs_input_grad[1]:
                grad_bias = grad.sum((0, 2, 3)).to(ctx.bias_dtype)
        return grad_x, grad_bias, None, None, None, None, None


@torch.library.register_fake("trine::int8_conv2d")
def _fake(
    x,
    packed_weight,
    weight_scale,
    bias,
    stride,
    padding,
    dilation,
    groups,
    channels_last,
    input_scale=None,
    input_zero_point=None,
):
    check_one_device(
        "int8_conv2d", x, packed_weight, weight_scale, bias, input_scale, input_zero_point
    )
    check_rows("int8_conv2d", x)
    _check(x.dim() == 4, "x must be [batch, channels, height, width]")
    batch, (channels, height, width) = x.shape[0], x.shape[1:]
    if channels_last:
        height, width, channels = x.shape[1:]
    _check(weight_scale.dim() == 1, "weight_scale must be float32 [N], one per output channel")
    n = weight_scale.shape[0]
    _check(
        groups >= 1 and channels % groups == 0 and n % groups == 0,
        f"groups = {groups} must divide the {channels} input and the {n} output channels",
    )
    kernel = packed_weight.shape[1:3] if packed_weight.dim() == 4 else packed_weight.shape[2:4]
    shape = (n, channels // groups, *kernel)
    _check(
        len(kernel) == 2 and tuple(packed_weight.shape) == packed_shape(shape, groups),
        "packed_weight does not fit; pack the weight with trine.ops.pack_conv2d",
    )
    _check(
        shape[1] * kernel[0] * kernel[1] <= _MAX_PATCH, f"a patch has more than {_MAX_PATCH} values"
    )
    _check(
        bias is None or (bias.dim() == 1 and bias.shape[0] == n),
        f"bias must have shape [{n}], one value per output channel",
    )
    sizes = []
    for size, k, s, p, d in zip((height, width), kernel, stride, padding, dilation, strict=True):
        spare = size + 2 * p - d * (k - 1) - 1
        _check(spare >= 0, f"the kernel spans more than the {size + 2 * p} pixels of the input")
        sizes.append(spare // s + 1)
    return x.new_empty((batch, *sizes, n) if channels_last else (batch, n, *sizes))


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"int8_conv2d: {message}")
