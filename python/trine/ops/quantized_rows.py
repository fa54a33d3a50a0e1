"""Rows that are quantised once, for all the linear ops that take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trine.ops._linear import needs_grad
from trine.ops.norm_quantize_rows import layer_norm_quantize_rows, rms_norm_quantize_rows
from trine.ops.quantize_rows import quantize_rows


@dataclass(frozen=True)
class QuantizedRows:
    """A quantised tensor [..., K]: what `int8_linear` and `ternary_linear` take in place of x.

    The linear ops quantise x inside, each by itself. Where several read one tensor (a block's
    query, key and value; gate and up) or where a norm comes before them, this does it once. The
    results are those of the float tensor that was quantised, bit for bit. One class beside the
    tuples that the operators give, and not an operator for each pair of norm and layer.

    On a CPU it pays with a norm, because torch's takes longer than all the quantising. Without one
    it wins nothing there: quantising a row costs no more than the call that is added. On a GPU it
    saves launches.

    It knows of its tensor what models ask between a norm and a layer: shape, dtype and device. It
    carries no gradient.
    """

    q: Tensor  # int8 [M, K], in [-127, 127]
    scale: Tensor  # float32 [M]
    sum: Tensor  # int32 [M], of each row's q
    shape: torch.Size  # of the tensor
    dtype: torch.dtype  # of the tensor, and of what a linear op makes of it

    @classmethod
    def of(cls, x: Tensor) -> QuantizedRows:
        """`quantize_rows(x)`."""
        return cls(*quantize_rows(x), x.shape, x.dtype)

    @classmethod
    def of_rms_norm(
        cls, x: Tensor, weight: Tensor | None = None, eps: float | None = None
    ) -> QuantizedRows:
        """`rms_norm_quantize_rows(x, weight, eps)`."""
        return cls(*rms_norm_quantize_rows(x, weight, eps), x.shape, x.dtype)

    @classmethod
    def of_layer_norm(
        cls,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> QuantizedRows:
        """`layer_norm_quantize_rows(x, weight, bias, eps)`."""
        return cls(*layer_norm_quantize_rows(x, weight, bias, eps), x.shape, x.dtype)

    @property
    def device(self) -> torch.device:
        return self.q.device

    def dim(self) -> int:
        return len(self.shape)

    def linear(
        self,
        op,
        packed_weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        activation: int = 0,
    ) -> Tensor:
        """[..., N], from the linear operator `op` on quantised rows."""
        if needs_grad(self.scale, packed_weight, weight_scale, bias):
            raise ValueError(
                "quantised rows carry no gradient; give the linear op the float tensor, or compute "
                "under torch.no_grad()"
            )
        device = self.q.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.dtype
        y = op(self.q, self.scale, self.sum, packed_weight, weight_scale, bias, dtype, activation)
        return y if len(self.shape) == 2 else y.reshape(*self.shape[:-1], y.shape[-1])
