"""Layers whose weight is a product of small ones: plain torch modules, trainable as they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from trine.nn.dense_weight import DenseWeight


class LowRankLinear(nn.Module):
    """y = second(first(x)) + residual(x): a linear layer of rank r, and what that rank leaves out.

    `first` is nn.Linear K -> r without a bias, `second` nn.Linear r -> N with the layer's; both can
    be packed (by `trine.compress`, say) like any other linear layer. `residual` is None or a layer
    K -> N without a bias, such as a `Sparse24Linear`.

    Args:
        in_features: K.
        out_features: N.
        rank: r, at least 1.
        bias, device, dtype: as for torch.nn.Linear.
        residual: whether there is one; it is nn.Linear until it is replaced.

    Raises ValueError for a rank below 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"LowRankLinear: rank is {rank}; it must be at least 1")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        kind = {"device": device, "dtype": dtype}
        self.first = nn.Linear(in_features, rank, bias=False, **kind)
        self.second = nn.Linear(rank, out_features, bias, **kind)
        self.residual = (
            nn.Linear(in_features, out_features, bias=False, **kind) if residual else None
        )

    @classmethod
    def from_factors(
        cls,
        first: Tensor,
        second: Tensor,
        bias: Tensor | None = None,
        residual: nn.Module | None = None,
    ) -> LowRankLinear:
        """The layer of weight `second @ first` (plus that of `residual`), which keeps the tensors.

        Args:
            first: [r, K].
            second: [N, r], of the same dtype.
            bias: [N] or None.
            residual: a layer K -> N without a bias, or None.
        """
        (rank, k), n = first.shape, len(second)
        layer = cls(k, n, rank, bias is not None, device="meta", dtype=first.dtype)
        layer.first.weight, layer.second.weight = nn.Parameter(first), nn.Parameter(second)
        if bias is not None:
            layer.second.bias = nn.Parameter(bias)
        layer.residual = residual
        return layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return y if self.residual is None else y + self.residual(x)

    @property
    def bias(self) -> Tensor | None:
        return self.second.bias

    @property
    def dtype(self) -> torch.dtype:
        return self.first.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.first.weight.device

    @property
    def weight(self) -> Tensor:
        """The dense weight [N, K] that the layer stands for; read-only, made when it is used."""
        return self.dense_weight() if torch.compiler.is_compiling() else DenseWeight(self)

    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def dense_weight(self) -> Tensor:
        """`weight` as a plain tensor; gradients flow through it to the factors."""
        product = self.second.weight @ self.first.weight
        return product if self.residual is None else product + self.residual.weight

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"


class LowRankConv2d(nn.Sequential):
    """Convolutions in a row that stand for one: nn.Conv2d without biases but in the last.

    Between them there is nothing, so that they equal one convolution with the kernel `weight`.
    """

    @property
    def weight(self) -> Tensor:
        """The kernel [N, C, height, width] of the one convolution; gradients flow through it."""
        inputs = self[0].in_channels
        kind = {"dtype": self[0].weight.dtype, "device": self[0].weight.device}
        # What all of them make of an impulse in each channel is their common kernel, mirrored.
        response = torch.eye(inputs, **kind)[:, :, None, None]
        for layer in self:
            margin = [size - 1 for size in layer.kernel_size]
            response = functional.conv2d(
                response, layer.weight, padding=margin, groups=layer.groups
            )
        return response.flip(2, 3).transpose(0, 1)

    @property
    def bias(self) -> Tensor | None:
        return self[-1].bias
