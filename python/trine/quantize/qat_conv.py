"""Quantisation-aware training of convolutions: in evaluation the bits of `Int8Conv2d`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trine import nn as packed_nn  # a package that imports this one: used in calls only
from trine.ops._checks import check_rows
from trine.ops._linear import in_autocast_dtype, needs_grad, without_autocast
from trine.quantize.input_range import InputRange, static_rows
from trine.quantize.qat import through_grid
from trine.quantize.qat_layer import QatLayer
from trine.quantize.weights import int8_absmax, int8_rows

CHOICES = ("int8", "int8-static")


class QatConv2d(QatLayer, nn.Conv2d):
    """nn.Conv2d with a dense master weight that is used as if it were int8.

    As `QatLinear`: in training mode the arithmetic of the kernel in floats, in evaluation mode the
    kernel itself, in both the straight-through gradient.

    Args:
        in_channels, ..., device, dtype: as for torch.nn.Conv2d, padded with zeros.
        choice: "int8": activations have a scale for each image. "int8-static": one scale and zero
            point, by `input_range` (see `QatSchedule`); NaN until `prepare_qat` or `begin_input`
            sets it.

    Raises ValueError for another choice, or padding that has no kernel.
    """

    def __init__(self, *args: Any, choice: str = "int8", **kwargs: Any) -> None:
        if choice not in CHOICES:
            raise ValueError(f"QatConv2d: choice is {choice!r}; it must be one of {CHOICES}")
        super().__init__(*args, **kwargs)
        self.choice, self.norm = choice, None
        self.pixels = packed_nn.int8_conv.padding_in_pixels(self)
        self.input_range = None
        if choice == "int8-static":
            self.input_range = InputRange(self.weight.device)
            unknown = self.weight.new_full((1,), torch.nan, dtype=torch.float32)
            self.begin_input(unknown, unknown, unknown)

    def forward(self, x: Tensor) -> Tensor:
        x = in_autocast_dtype(x)
        check_rows("QatConv2d", x)
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"QatConv2d: the input has shape {list(x.shape)}, expected "
                f"[batch, {self.in_channels}, height, width]"
            )
        if self.training and self.input_range is not None:
            self.input_range.watch(x)
        packed = None if self.training else self._packed_layer()
        if packed is not None and not needs_grad(x, *self.parameters()):
            return packed.with_bias(x, self.used_bias)
        options = (self.stride, self.pixels, self.dilation, self.groups)
        images = x if x.dim() == 4 else x[None]
        weight, bias = self.used(self.weight)
        bias = None if self.follows_batches else bias
        y = _ThroughConvolution.apply(images, weight, bias, *self._input_grid(), options, packed)
        if self.follows_batches:
            products = functional.conv2d(images, self.weight.to(images.dtype), None, *options)
            y = self.norm.of_batch(y, products, self.bias)
        return y if x.dim() == 4 else y[0]

    def float_layer(self) -> nn.Conv2d:
        return nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.used_bias is not None,
            self.padding_mode,
            "meta",
            self.weight.dtype,
        )

    def _pack(self, **static_input: Tensor | None) -> nn.Module:
        return packed_nn.Int8Conv2d.from_conv(self, **static_input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, choice={self.choice}"


class _ThroughConvolution(torch.autograd.Function):
    """The quantised convolution with the gradient of the plain one at the quantised values."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        input_scale: Tensor | None,
        input_zero_point: Tensor | None,
        options: tuple,
        packed: nn.Module | None,
    ) -> Tensor:
        codes, weight_scale = int8_absmax(weight.flatten(1))
        rows = x.flatten(1)  # an image is a row
        if input_scale is None:
            q, row_scale = int8_rows(rows)
        else:
            q, row_scale = static_rows(rows, input_scale, input_zero_point)
        static = (rows, input_scale, input_zero_point) if input_scale is not None else (None,) * 3
        ctx.save_for_backward(q, row_scale, codes, weight_scale, *static)
        ctx.options, ctx.x_shape, ctx.weight_shape = options, x.shape, weight.shape
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        if packed is not None:
            return packed.with_bias(x, bias)
        stride, padding, dilation, groups = options
        with without_autocast(x):
            y = functional.conv2d(
                q.float().reshape(x.shape),
                codes.float().reshape(weight.shape),
                None,
                stride,
                padding,
                dilation,
                groups,
            )
        y = y * row_scale[:, None, None, None] * weight_scale[:, None, None]
        if bias is not None:
            y = y + bias.float()[:, None, None]
        return y.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable  # the saved values have no history
    def backward(ctx, grad_y: Tensor):
        q, row_scale, codes, weight_scale, rows, input_scale, zero_point = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad, grad_x, grad_weight, grad_bias = grad_y.float(), None, None, None
        with without_autocast(grad):
            if needs_x:
                dense = (codes * weight_scale[:, None]).reshape(ctx.weight_shape)
                grad_x = torch.nn.grad.conv2d_input(ctx.x_shape, dense, grad, *ctx.options)
                if input_scale is not None:
                    of_rows, _ = through_grid(grad_x.flatten(1), rows, input_scale, zero_point)
                    grad_x = of_rows.reshape(ctx.x_shape)
                grad_x = grad_x.to(ctx.x_dtype)
            if needs_weight:
                images = (q.float() * row_scale[:, None]).reshape(ctx.x_shape)
                grad_weight = torch.nn.grad.conv2d_weight(
                    images, ctx.weight_shape, grad, *ctx.options
                ).to(ctx.weight_dtype)
            if needs_bias:
                grad_bias = grad.sum((0, 2, 3)).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None
