"""Linear layer with weights in {-1, 0, 1}; activations are quantised to int8 inside."""

from typing import Any

import torch
from torch import Tensor, nn

from trine.nn.codes import CodesLinear, granularity_of, shape_of_scale
from trine.nn.packed import activation_option, dense_parts
from trine.ops import pack_ternary, ternary_linear, unpack_ternary
from trine.ops.activation import activation_code
from trine.ops.ternary_linear.pack import CHUNK
from trine.quantize.weights import dense, ternary_absmean, ternary_twn


class TernaryLinear(CodesLinear):
    """y = activation(x @ (codes * weight_scale).T + bias), on `trine.ops.ternary_linear`.

    Buffers: packed_weight int32 [N, 4 * ceil(K / 64)], weight_scale float32 ([1], [N] or
    [N, K / group size], see `granularity`), bias [N] or None.

    Args:
        in_features: K.
        out_features: N.
        bias: whether the layer has one.
        granularity: how much of the weight shares one scale: "tensor" (BitNet), "row", or a group
            size, that many consecutive columns of a row (a multiple of 64 that divides K).
        activation: None, "relu", "gelu" or "gelu_tanh", computed before the result is rounded; an
            attribute that may be set later.
        device, dtype: as for torch.nn.Linear; float32, bfloat16 or float16.

    Raises ValueError for another granularity, activation or dtype.
    """

    kind = "ternary"
    takes_quantized_rows = True

    _pack = staticmethod(pack_ternary)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        granularity: str | int = "tensor",
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, dtype)
        self.granularity = granularity
        activation_code(type(self).__name__, activation)
        self.activation = activation
        words = CHUNK // 16 * -(-in_features // CHUNK)
        scale_shape = shape_of_scale("TernaryLinear", granularity, out_features, in_features)
        self._add_buffer("packed_weight", (out_features, words), torch.int32, device)
        self._add_buffer("weight_scale", scale_shape, torch.float32, device)
        self._add_buffer("bias", (out_features,) if bias else None, self._dtype, device)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, *, rule: str = "absmean", group: int | None = None
    ) -> "TernaryLinear":
        """Pack a dense layer, with one scale for the tensor or for each group.

        Args:
            linear: torch.nn.Linear or transformers' Conv1D, float32, bfloat16 or float16. A layer
                that was not trained for it loses most of its accuracy.
            rule: "absmean" (BitNet b1.58, `trine.quantize.ternary_absmean`) or "threshold" (TWN,
                `trine.quantize.ternary_twn`).
            group: the group size, a multiple of 64 that divides K; None: one scale for the tensor.

        Raises ValueError for another class, dtype, rule or group, and for NaN or infinite weights.
        """
        rules = {"absmean": ternary_absmean, "threshold": ternary_twn}
        if rule not in rules:
            raise ValueError(f"TernaryLinear: rule is {rule!r}; it must be one of {list(rules)}")
        weight, bias = dense_parts(linear)
        if group is not None:
            shape_of_scale("TernaryLinear", group, *weight.shape)  # raises where it is none
        return cls.from_codes(*rules[rule](weight, group), bias, dtype=weight.dtype)

    def _run_op(self, x: Tensor, bias: Tensor | None) -> Tensor:
        buffers = self._buffers
        return ternary_linear(
            x,
            buffers["packed_weight"],
            buffers["weight_scale"],
            bias,
            activation=self.activation,
        )

    def _dense_weight(self) -> Tensor:
        return dense(unpack_ternary(self.packed_weight, self.in_features), self.weight_scale)

    def _options(self) -> dict[str, Any]:
        return {"granularity": self.granularity, **activation_option(self.activation)}

    @staticmethod
    def _granularity_of(weight_scale: Tensor, n: int, k: int) -> str | int:
        return granularity_of("TernaryLinear", weight_scale, n, k)
