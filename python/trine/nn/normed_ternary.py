"""Linear layer of ternary weights with an RMSNorm of its own before it."""

from typing import Any

import torch
from torch import Tensor, nn

from trine.nn.ternary import TernaryLinear
from trine.ops import QuantizedRows, ternary_linear


class NormedTernaryLinear(TernaryLinear):
    """y = rms_norm(x) @ (codes * weight_scale).T + bias: the layer of the first BitNet models.

    Norm and row quantisation are one pass (`trine.ops.rms_norm_quantize_rows`). Where a gradient to
    x is wanted the norm is PyTorch's own, with equal bits in float32 up to its rounding.

    Buffers: those of `TernaryLinear`, and norm_weight [K].

    Args:
        in_features, out_features, bias, granularity, activation, device, dtype: as for
            `TernaryLinear`.
        eps: what the norm adds to the mean square.
    """

    kind = "rms_norm_ternary"
    takes_quantized_rows = False
    float_buffers = ("norm_weight", "bias")

    norm_weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        eps: float = 1e-6,
        granularity: str | int = "tensor",
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias,
            granularity=granularity,
            activation=activation,
            device=device,
            dtype=dtype,
        )
        self.eps = eps
        self._add_buffer("norm_weight", (in_features,), self._dtype, device)

    @classmethod
    def from_ternary(
        cls, layer: TernaryLinear, norm_weight: Tensor, eps: float
    ) -> "NormedTernaryLinear":
        """`layer`, whose tensors it shares, behind a norm.

        Raises ValueError for a norm_weight that is not [K].
        """
        if norm_weight.shape != (layer.in_features,):
            raise ValueError(
                f"NormedTernaryLinear: norm_weight has shape {list(norm_weight.shape)}, expected "
                f"[{layer.in_features}]"
            )
        normed = cls(**layer.config(), eps=eps, device="meta")
        normed.packed_weight, normed.weight_scale = layer.packed_weight, layer.weight_scale
        normed.bias = layer.bias
        normed.norm_weight = norm_weight.detach().to(layer.device, layer.dtype, copy=True)
        return normed

    def _run_op(self, x: Tensor, bias: Tensor | None) -> Tensor:
        buffers = self._buffers
        weight = buffers["norm_weight"]
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            rows = nn.functional.rms_norm(x, (self.in_features,), weight, self.eps)
        else:
            rows = QuantizedRows.of_rms_norm(x, weight, self.eps)
        return ternary_linear(
            rows,
            buffers["packed_weight"],
            buffers["weight_scale"],
            bias,
            activation=self.activation,
        )

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "eps": self.eps}
