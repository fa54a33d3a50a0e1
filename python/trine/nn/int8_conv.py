"""2-d convolution with an int8 weight; activations are quantised to int8 inside."""

from typing import Any

import torch
from torch import Tensor, nn

from trine.nn.packed import FLOAT_DTYPES, PackedLayer
from trine.ops import int8_conv2d, pack_conv2d, unpack_conv2d
from trine.ops.int8_conv2d.pack import packed_shape
from trine.quantize.weights import int8_absmax

Pair = tuple[int, int]


class Int8Conv2d(PackedLayer):
    """conv2d(x, codes * weight_scale) + bias, on `trine.ops.int8_conv2d`.

    Buffers: packed_weight int8 (see `pack_conv2d`), weight_scale float32 [out_channels], bias or
    None, and, with `static_input`, input_scale float32 [1] and input_zero_point int32 [1].

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as for
            torch.nn.Conv2d; padding in pixels, with zeros.
        static_input: the activations have one scale and zero point, fixed beforehand, instead of
            one scale per image, found at run time.
        device, dtype: as for torch.nn.Conv2d; float32, bfloat16 or float16.
    """

    kind = "int8-conv2d"

    packed_weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        static_input: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__(dtype)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
        self.padding, self.dilation = _pair(padding), _pair(dilation)
        self.static_input = static_input
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"Int8Conv2d: groups = {groups} must divide the {in_channels} input and the "
                f"{out_channels} output channels"
            )
        packed = packed_shape(self.weight_shape(), groups)
        self._add_buffer("packed_weight", packed, torch.int8, device)
        self._add_buffer("weight_scale", (out_channels,), torch.float32, device)
        self._add_buffer("bias", (out_channels,) if bias else None, self._dtype, device)
        self._add_input_grid(static_input, device)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
    ) -> "Int8Conv2d":
        """Pack a dense convolution, each output channel by its largest magnitude.

        Args:
            conv: torch.nn.Conv2d, float32, bfloat16 or float16, padded with zeros.
            input_scale: one float32 value, for statically quantised activations.
            input_zero_point: one int32 value in [-128, 127]; 0 where it is None.

        Raises ValueError for another class, dtype or padding, and for NaN or infinite weights.
        """
        if not isinstance(conv, nn.Conv2d):
            raise ValueError(f"from_conv takes torch.nn.Conv2d; got {type(conv).__name__}")
        weight = conv.weight.detach()
        if weight.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"from_conv: the weight is {weight.dtype}; convert the layer to float32, bfloat16 "
                "or float16 first"
            )
        if not weight.isfinite().all():
            raise ValueError("from_conv: the weight holds NaN or infinity; it cannot be quantised")
        codes, scale = int8_absmax(weight.flatten(1))
        static = {"input_scale": input_scale, "input_zero_point": input_zero_point}
        return cls.from_codes(conv, codes.reshape(weight.shape), scale, **static)

    @classmethod
    def from_codes(
        cls,
        conv: nn.Conv2d,
        codes: Tensor,
        weight_scale: Tensor,
        *,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
    ) -> "Int8Conv2d":
        """Pack codes int8 [out, in / groups, kh, kw], -127 to 127, and their scales [out].

        Shape, bias and dtype are those of `conv`; the rest as for `from_conv`.
        """
        if input_scale is None and input_zero_point is not None:
            raise ValueError("Int8Conv2d: input_zero_point needs input_scale beside it")
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            padding_in_pixels(conv),
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            static_input=input_scale is not None,
            device="meta",
            dtype=conv.weight.dtype,
        )
        layer.packed_weight = pack_conv2d(codes, conv.groups)
        layer.weight_scale = weight_scale.detach().to(codes.device, torch.float32, copy=True)
        layer.bias = None if conv.bias is None else conv.bias.detach().clone()
        layer._set_input_grid(input_scale, input_zero_point, codes.device)
        return layer

    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def _dense_weight(self) -> Tensor:
        codes = unpack_conv2d(self.packed_weight, self.weight_shape())
        return codes * self.weight_scale[:, None, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.with_bias(x, self._buffers["bias"])

    def with_bias(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer gives with this bias in place of its own."""
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"Int8Conv2d: the input has shape {list(x.shape)}, expected "
                f"[batch, {self.in_channels}, height, width]"
            )
        y = int8_conv2d(
            x if x.dim() == 4 else x[None],
            self.packed_weight,
            self.weight_scale,
            bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            input_scale=self.input_scale,
            input_zero_point=self.input_zero_point,
        )
        return y if x.dim() == 4 else y[0]

    def config(self) -> dict[str, Any]:
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "bias": self.bias is not None,
            "static_input": self.static_input,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def padding_in_pixels(conv: nn.Conv2d) -> Pair:
    """The padding of a convolution as numbers; ValueError where it is not zeros on both sides."""
    if conv.padding_mode != "zeros":
        raise ValueError(
            f"Int8Conv2d: padding_mode is {conv.padding_mode!r}; only 'zeros' has a kernel"
        )
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if any(span % 2 for span in spans):
            raise ValueError(
                "Int8Conv2d: padding='same' of an even kernel pads one side more than the other, "
                "for which there is no kernel; pad with torch.nn.ZeroPad2d before it"
            )
        return (spans[0] // 2, spans[1] // 2)
    return conv.padding


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else tuple(value)
