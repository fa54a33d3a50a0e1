"""Linear layer with an int8 weight; activations are quantised to int8 inside."""

from typing import Any

import torch
from torch import Tensor, nn

from trine.nn.packed import PackedLinear, activation_option, dense_parts
from trine.ops import int8_linear, pack_int8, unpack_int8
from trine.ops.activation import activation_code
from trine.ops.int8_linear.pack import CHUNK
from trine.quantize.weights import int8_absmax


class Int8Linear(PackedLinear):
    """y = activation(x @ (codes * weight_scale).T + bias), on `trine.ops.int8_linear`.

    Buffers: packed_weight int8 [N, 16 * ceil(K / 16)], weight_scale float32 [N], bias [N] or None,
    and, with `static_input`, input_scale float32 [1] and input_zero_point int32 [1].

    Args:
        in_features: K.
        out_features: N.
        bias: whether the layer has one.
        static_input: the activations have one scale and zero point, fixed beforehand, instead of
            one scale per row, found at run time.
        activation: None, "relu", "gelu" or "gelu_tanh", computed before the result is rounded; an
            attribute that may be set later.
        device, dtype: as for torch.nn.Linear; float32, bfloat16 or float16.
    """

    kind = "int8"

    packed_weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        static_input: bool = False,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, dtype)
        activation_code(type(self).__name__, activation)
        self.activation = activation
        packed_k = CHUNK * -(-in_features // CHUNK)
        self._add_buffer("packed_weight", (out_features, packed_k), torch.int8, device)
        self._add_buffer("weight_scale", (out_features,), torch.float32, device)
        self._add_buffer("bias", (out_features,) if bias else None, self._dtype, device)
        self._add_input_grid(static_input, device)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
    ) -> "Int8Linear":
        """Pack a dense layer, each row of its weight by its largest magnitude.

        Args:
            linear: torch.nn.Linear or transformers' Conv1D, float32, bfloat16 or float16.
            input_scale: one float32 value, for statically quantised activations.
            input_zero_point: one int32 value in [-128, 127]; 0 where it is None.

        Raises ValueError for another class or dtype, and for NaN or infinite weights.
        """
        weight, bias = dense_parts(linear)
        return cls.from_codes(
            *int8_absmax(weight),
            bias,
            input_scale=input_scale,
            input_zero_point=input_zero_point,
            dtype=weight.dtype,
        )

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        *,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> "Int8Linear":
        """Pack a weight that is int8 already.

        Args:
            codes: int8 [N, K], values -127 to 127.
            weight_scale: [N].
            bias: [N] or None.
            input_scale, input_zero_point: as for `from_linear`.
            dtype: the layer's float dtype; that of the bias, or torch's default, where it is None.

        Raises ValueError for shapes or values that do not fit.
        """
        if input_scale is None and input_zero_point is not None:
            raise ValueError("Int8Linear: input_zero_point needs input_scale beside it")
        packed, (n, k) = pack_int8(codes), codes.shape
        for name, tensor in (("weight_scale", weight_scale), ("bias", bias)):
            if tensor is not None and tensor.shape != (n,):
                raise ValueError(f"Int8Linear: {name} has shape {list(tensor.shape)}, not [{n}]")
        if dtype is None and bias is not None:
            dtype = bias.dtype
        static = input_scale is not None
        layer = cls(k, n, bias is not None, static_input=static, device="meta", dtype=dtype)
        layer.packed_weight = packed
        layer.weight_scale = weight_scale.detach().to(codes.device, torch.float32, copy=True)
        if bias is not None:
            layer.bias = bias.detach().to(codes.device, layer._dtype, copy=True)
        layer._set_input_grid(input_scale, input_zero_point, codes.device)
        return layer

    @property
    def takes_quantized_rows(self) -> bool:
        return self.input_scale is None

    def _run_op(self, x: Tensor, bias: Tensor | None) -> Tensor:
        buffers = self._buffers
        return int8_linear(
            x,
            buffers["packed_weight"],
            buffers["weight_scale"],
            bias,
            input_scale=buffers["input_scale"],
            input_zero_point=buffers["input_zero_point"],
            activation=self.activation,
        )

    def _dense_weight(self) -> Tensor:
        return unpack_int8(self.packed_weight, self.in_features) * self.weight_scale[:, None]

    def _options(self) -> dict[str, Any]:
        static = self.input_scale is not None
        return {"static_input": static, **activation_option(self.activation)}
