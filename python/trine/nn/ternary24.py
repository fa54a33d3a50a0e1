"""Linear layer with 2:4-sparse weights in {-1, 0, 1}; activations are quantised to int8 inside."""

from typing import Any

import torch
from torch import Tensor, nn

from trine.nn.codes import CodesLinear
from trine.nn.packed import dense_parts
from trine.ops import pack_ternary24, ternary24_linear, unpack_ternary24
from trine.ops.ternary24_linear.pack import row_bytes
from trine.quantize.weights import ternary24_absmean


class Ternary24Linear(CodesLinear):
    """y = x @ (codes * weight_scale).T + bias, on `trine.ops.ternary24_linear`.

    Buffers: packed_weight uint8 [N, 16 * ceil(6 * ceil(K / 4) / 128)], 1.5 bits a weight;
    weight_scale float32 ([1] or [N], see `granularity`), bias [N] or None.

    Args:
        in_features: K.
        out_features: N.
        bias: whether the layer has one.
        granularity: how much of the weight shares one scale: "tensor" or "row".
        device, dtype: as for torch.nn.Linear; float32, bfloat16 or float16.

    Raises ValueError for another granularity or dtype.
    """

    kind = "ternary24"

    _pack = staticmethod(pack_ternary24)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        granularity: str = "tensor",
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, dtype)
        if granularity not in ("tensor", "row"):
            raise ValueError(
                f"Ternary24Linear: granularity is {granularity!r}; it must be 'tensor' or 'row'"
            )
        self.granularity = granularity
        scales = 1 if granularity == "tensor" else out_features
        packed_shape = (out_features, row_bytes(in_features))
        self._add_buffer("packed_weight", packed_shape, torch.uint8, device)
        self._add_buffer("weight_scale", (scales,), torch.float32, device)
        self._add_buffer("bias", (out_features,) if bias else None, self._dtype, device)

    @classmethod
    def from_linear(cls, linear: nn.Module) -> "Ternary24Linear":
        """Pack a dense layer: of every four weights the two of largest magnitude stay, by their
        mean magnitude (see `trine.quantize.weights.ternary24_absmean`).

        Args:
            linear: torch.nn.Linear or transformers' Conv1D, float32, bfloat16 or float16. A layer
                that was not trained for it loses most of its accuracy.

        Raises ValueError for another class or dtype, and for NaN or infinite weights.
        """
        weight, bias = dense_parts(linear)
        return cls.from_codes(*ternary24_absmean(weight), bias, dtype=weight.dtype)

    def _run_op(self, x: Tensor, bias: Tensor | None) -> Tensor:
        buffers = self._buffers
        return ternary24_linear(x, buffers["packed_weight"], buffers["weight_scale"], bias)

    def _dense_weight(self) -> Tensor:
        codes = unpack_ternary24(self.packed_weight, self.in_features)
        return codes * self.weight_scale[:, None]

    def _options(self) -> dict[str, Any]:
        return {"granularity": self.granularity}

    @staticmethod
    def _granularity_of(weight_scale: Tensor, n: int, k: int) -> str:
        shape = tuple(weight_scale.shape)
        if shape not in ((1,), (n,)):
            raise ValueError(
                f"Ternary24Linear: weight_scale has shape {list(shape)}, expected [1] or [{n}]"
            )
        return "tensor" if shape == (1,) else "row"
