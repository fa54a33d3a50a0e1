"""Linear layers and convolutions as products of two: the singular value decomposition."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from trine.calibration import SecondMoment, weight_matrix
from trine.factorize.matrices import directions, factors, relative_error, root_of
from trine.factorize.plan import AnyRank, Plan
from trine.nn.low_rank import LowRankConv2d, LowRankLinear
from trine.nn.low_rank_embedding import LowRankEmbedding


class Svd:
    """W [N, K] becomes second [N, r] @ first [r, K], the best of that rank.

    Of nn.Linear and transformers' Conv1D it makes a `trine.nn.LowRankLinear`, of nn.Conv2d (of one
    group) a kernel with r outputs and a 1x1 convolution (`trine.nn.LowRankConv2d`; Zhang et al.,
    arXiv:1505.06798).

    Args:
        moments: `trine.calibrate(model, data, trine.calibration.SecondMoment)`: what is minimised
            is then the error of the layers' outputs on that data, ||X (W - W')^T||_F, not that of
            the weights (SVD-LLM, arXiv:2403.07378). A layer without a moment is an error.
    """

    name = "svd"
    kinds = (nn.Linear, nn.Conv2d)

    def __init__(self, moments: Mapping[str, SecondMoment] | None = None) -> None:
        self.moments = moments

    def plan(self, name: str, layer: nn.Module) -> Plan:
        weight, gram = weight_matrix(layer), self.gram(name, layer)
        u, s = directions(weight, None if gram is None else root_of(gram))
        n, k = weight.shape
        squares = s.square()
        # From the smallest on, so that small ones count.
        tails = squares.flip(0).cumsum(0).flip(0)
        total = float(tails[0])
        ranks = range(1, len(s) + 1)
        losses = [*(tails[1:] / total if total else tails[1:]).tolist(), 0.0]
        u = u.float()  # half the memory; its own rounding is below that of the factors
        return Plan(
            dense=n * k,
            ranks=ranks,
            parameters=[rank * (n + k) for rank in ranks],
            losses=losses,
            build=partial(_build, layer, u),
            size=lambda rank: checked_rank(rank, len(s)) * (n + k),
            error=lambda built: relative_error(weight, dense_matrix(layer, built), gram),
        )

    def gram(self, name: str, layer: nn.Module) -> Tensor | None:
        """X^T X of the layer's input, or None where no moments are given."""
        if self.moments is None:
            return None
        if name not in self.moments:
            raise ValueError(
                f"there is no second moment of layer {name!r}; calibrate it too, or leave it out "
                f"with skip={name!r}"
            )
        gram, columns = self.moments[name].gram, weight_matrix(layer).shape[-1]
        if gram.shape != (columns, columns):
            raise ValueError(
                f"the second moment of layer {name!r} is {list(gram.shape)}, its weight has "
                f"{columns} columns; calibrate this model"
            )
        if not torch.isfinite(gram).all():
            raise ValueError(f"the second moment of layer {name!r} holds NaN or infinity")
        return gram


def _build(layer: nn.Module, u: Tensor, rank: AnyRank) -> nn.Module:
    second, first = factors(weight_matrix(layer), u[:, : checked_rank(rank, u.shape[1])])
    return from_factors(layer, first, second)


def checked_rank(rank: AnyRank, most: int) -> int:
    """`rank`, where it is a whole number from 1 to `most`; ValueError otherwise."""
    if type(rank) is not int or not 1 <= rank <= most:
        raise ValueError(f"rank {rank!r} is not a whole number from 1 to {most}")
    return rank


def from_factors(
    layer: nn.Module, first: Tensor, second: Tensor, residual: nn.Module | None = None
) -> nn.Module:
    """The factorised layer that takes the place of `layer`, in its dtype and mode."""
    dtype = layer.weight.dtype
    first, second = first.to(dtype).contiguous(), second.to(dtype).contiguous()
    if isinstance(layer, nn.Embedding):
        second[(layer.weight == 0).all(1)] = 0  # exactly, for the row of padding
        made = LowRankEmbedding.from_factors(first, second, layer.padding_idx)
        return made.train(layer.training)
    bias = None if layer.bias is None else layer.bias.detach().clone()
    if isinstance(layer, nn.Conv2d):
        inner = convolution_like(layer, layer.in_channels, len(first), from_window(layer, first))
        outer = pointwise(second, bias)
        return LowRankConv2d(inner, outer).train(layer.training)
    return LowRankLinear.from_factors(first, second, bias, residual).train(layer.training)


def from_window(layer: nn.Conv2d, matrix: Tensor) -> Tensor:
    """Rows over the windows of `layer` as kernels [rows, C, height, width]."""
    return matrix.unflatten(1, layer.weight.shape[1:])


def convolution_like(
    layer: nn.Conv2d, in_channels: int, out_channels: int, weight: Tensor
) -> nn.Conv2d:
    """A convolution with the window, stride and padding of `layer`, of other channels; no bias."""
    made = nn.Conv2d(
        in_channels,
        out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        bias=False,
        padding_mode=layer.padding_mode,
        device="meta",
    )
    made.weight = nn.Parameter(weight.contiguous())
    return made


def pointwise(matrix: Tensor, bias: Tensor | None = None) -> nn.Conv2d:
    """The 1x1 convolution of weight `matrix` [N, C]."""
    made = nn.Conv2d(*reversed(matrix.shape), 1, bias=bias is not None, device="meta")
    made.weight = nn.Parameter(matrix[:, :, None, None].contiguous())
    if bias is not None:
        made.bias = nn.Parameter(bias)
    return made


def dense_matrix(layer: nn.Module, built: nn.Module) -> Tensor:
    """The weight that `built` stands for as a matrix [N, K], as `weight_matrix(layer)` is one."""
    return built.weight.detach().flatten(1)
