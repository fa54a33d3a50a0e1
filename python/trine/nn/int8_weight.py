"""Linear layer with an int8 weight under floating activations (weight-only INT8, W8A16)."""

from typing import Any

import torch
from torch import Tensor, nn

from trine.nn.codes import CodesLinear, granularity_of, shape_of_scale
from trine.nn.packed import dense_parts
from trine.ops import int8_weight_linear, pack_int8, unpack_int8
from trine.ops.int8_linear.pack import CHUNK
from trine.quantize.weights import dense, int8_absmax


class Int8WeightLinear(CodesLinear):
    """y = x @ (codes * weight_scale).T + bias, on `trine.ops.int8_weight_linear`.

    Activations stay floats, so that nothing is lost but what rounding the weight takes. Buffers:
    packed_weight int8 [N, 16 * ceil(K / 16)], weight_scale float32 ([N] or [N, K / group size], see
    `granularity`), bias [N] or None.

    Args:
        in_features: K.
        out_features: N.
        bias: whether the layer has one.
        granularity: how much of the weight shares one scale: "row", or a group size, that many
            consecutive columns of a row (a multiple of 64 that divides K).
        device, dtype: as for torch.nn.Linear; float32, bfloat16 or float16.

    Raises ValueError for another granularity or dtype.
    """

    kind = "int8-weight"

    _pack = staticmethod(pack_int8)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        granularity: str | int = "row",
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, dtype)
        self.granularity = granularity
        packed_k = CHUNK * -(-in_features // CHUNK)
        scale_shape = _scale_shape(granularity, out_features, in_features)
        self._add_buffer("packed_weight", (out_features, packed_k), torch.int8, device)
        self._add_buffer("weight_scale", scale_shape, torch.float32, device)
        self._add_buffer("bias", (out_features,) if bias else None, self._dtype, device)

    @classmethod
    def from_linear(cls, linear: nn.Module, *, group: int | None = None) -> "Int8WeightLinear":
        """Pack a dense layer, each row of its weight, or each group, by its largest magnitude.

        Args:
            linear: torch.nn.Linear or transformers' Conv1D, float32, bfloat16 or float16.
            group: the group size, a multiple of 64 that divides K; None: one scale for a row.

        Raises ValueError for another class, dtype or group, and for NaN or infinite weights.
        """
        weight, bias = dense_parts(linear)
        if group is not None:
            _scale_shape(group, *weight.shape)  # raises where it is no group size
        return cls.from_codes(*int8_absmax(weight, group), bias, dtype=weight.dtype)

    def _run_op(self, x: Tensor, bias: Tensor | None) -> Tensor:
        buffers = self._buffers
        return int8_weight_linear(x, buffers["packed_weight"], buffers["weight_scale"], bias)

    def _dense_weight(self) -> Tensor:
        return dense(unpack_int8(self.packed_weight, self.in_features), self.weight_scale)

    def _options(self) -> dict[str, Any]:
        return {"granularity": self.granularity}

    @staticmethod
    def _granularity_of(weight_scale: Tensor, n: int, k: int) -> str | int:
        return granularity_of("Int8WeightLinear", weight_scale, n, k, per_tensor=False)


def _scale_shape(granularity: str | int, n: int, k: int) -> tuple[int, ...]:
    return shape_of_scale("Int8WeightLinear", granularity, n, k, per_tensor=False)
