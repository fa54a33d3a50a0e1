"""Convolutions as chains of smaller ones: the decompositions of Tucker and of CP."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from trine.factorize.matrices import relative_error
from trine.factorize.plan import AnyRank, Plan
from trine.factorize.svd import checked_rank, convolution_like, dense_matrix, pointwise
from trine.nn.low_rank import LowRankConv2d


class Tucker:
    """A kernel [N, C, h, w] becomes 1x1 (C -> r_in), h x w (r_in -> r_out), 1x1 (r_out -> N).

    W[n, c] = sum over a, b of O[n, a] core[a, b] I[c, b]: the Tucker decomposition in the two modes
    of channels (Kim et al., arXiv:1511.06530). O and I start as the left singular vectors of W's
    unfoldings, whose squared error is at most the sum of all the s^2 that both cut off (De
    Lathauwer et al., 2000), and are improved in turns (HOOI). For nn.Conv2d of one group; a rank is
    a pair (r_in, r_out). `Energy` and `Parameters` go by that bound, along the path of pairs on
    which each step cuts the channel, of inputs or outputs, that loses least per parameter.

    Args:
        turns: how often O and I are improved.
    """

    name = "tucker"
    kinds = (nn.Conv2d,)

    def __init__(self, turns: int = 3) -> None:
        self.turns = turns

    def plan(self, name: str, layer: nn.Module) -> Plan:
        weight = layer.weight.detach()
        n, c, window = *weight.shape[:2], weight[0, 0].numel()

        def size(rank: AnyRank) -> int:
            inner, outer = _pair(rank, c, n)
            return c * inner + inner * outer * window + outer * n

        squares = [torch.linalg.svdvals(_unfold(weight.double(), mode)) ** 2 for mode in (1, 0)]
        # What is cut off where r singular values are kept, for each r.
        tails = [[*s.flip(0).cumsum(0).flip(0).tolist(), 0.0] for s in squares]
        # An unfolding may be narrower than it is high: there is nothing beyond.
        tails = [t + [0.0] * (most + 1 - len(t)) for t, most in zip(tails, (c, n), strict=True)]
        path = _path(tails, size, (c, n))
        total = tails[0][0]
        return Plan(
            dense=weight.numel(),
            ranks=path,
            parameters=[size(rank) for rank in path],
            losses=[
                min(1.0, (tails[0][i] + tails[1][o]) / total) if total else 0.0 for i, o in path
            ],
            build=partial(_build_tucker, layer, self.turns),
            size=size,
            error=lambda built: relative_error(weight.flatten(1), dense_matrix(layer, built)),
        )


def _pair(rank: AnyRank, c: int, n: int) -> tuple[int, int]:
    if not isinstance(rank, tuple) or len(rank) != 2:
        raise ValueError(f"rank {rank!r} is not a pair (inputs, outputs)")
    return checked_rank(rank[0], c), checked_rank(rank[1], n)


def _path(tails: list[list[float]], size, full: tuple[int, int]) -> list[tuple[int, int]]:
    """Pairs of ranks from (1, 1) to the full one, each with one channel more."""
    path = [full]
    while path[-1] != (1, 1):
        inner, outer = path[-1]
        steps = []
        for smaller in ((inner - 1, outer), (inner, outer - 1)):
            if min(smaller) > 0:
                lost = (tails[0][smaller[0]] - tails[0][inner]) + (
                    tails[1][smaller[1]] - tails[1][outer]
                )
                steps.append((lost / (size(path[-1]) - size(smaller)), smaller))
        path.append(min(steps)[1])
    return path[::-1]


def _unfold(weight: Tensor, mode: int) -> Tensor:
    return weight.movedim(mode, 0).flatten(1)


def _leading(tensor: Tensor, mode: int, rank: int) -> Tensor:
    u, _, _ = torch.linalg.svd(_unfold(tensor, mode), full_matrices=False)
    missing = rank - u.shape[1]
    return nn.functional.pad(u, (0, missing)) if missing > 0 else u[:, :rank]


def _build_tucker(layer: nn.Conv2d, turns: int, rank: AnyRank) -> nn.Module:
    inner, outer = _pair(rank, layer.in_channels, layer.out_channels)
    wide = layer.weight.detach().double()
    inputs, outputs = _leading(wide, 1, inner), _leading(wide, 0, outer)
    for _ in range(turns):
        outputs = _leading(torch.einsum("ncij,cb->nbij", wide, inputs), 0, outer)
        inputs = _leading(torch.einsum("ncij,na->acij", wide, outputs), 1, inner)
    core = torch.einsum("ncij,na,cb->abij", wide, outputs, inputs)
    # The size of the kernel is spread, so that a learning rate, or a scale, suits all three.
    share = core.norm() ** (1 / 3)
    share = share if share > 0 else torch.ones_like(share)
    dtype = layer.weight.dtype
    return LowRankConv2d(
        pointwise((inputs.T * share).to(dtype)),
        convolution_like(layer, inner, outer, (core / share**2).to(dtype)),
        pointwise((outputs * share).to(dtype), _bias(layer)),
    ).train(layer.training)


class Cp:
    """A kernel [N, C, h, w] becomes 1x1 (C -> r), h x 1 and 1 x w of each channel, 1x1 (r -> N).

    W[n, c, i, j] = sum over r of N[n, r] C[c, r] I[i, r] J[j, r]: the canonical polyadic
    decomposition (Lebedev et al., arXiv:1412.6553), by alternating least squares from a fixed
    start: a good one, not the best, which need not exist. For nn.Conv2d of one group, and for
    `Rank` and `Speedup`: what a rank loses is known only when it is built.

    Args:
        turns: the most rounds of least squares; they end when the error has settled.
    """

    name = "cp"
    kinds = (nn.Conv2d,)

    def __init__(self, turns: int = 200) -> None:
        self.turns = turns

    def plan(self, name: str, layer: nn.Module) -> Plan:
        weight = layer.weight.detach()
        each, dense = sum(weight.shape), weight.numel()
        most = max(1, dense // each)
        ranks = range(1, most + 1)
        return Plan(
            dense=dense,
            ranks=ranks,
            parameters=[rank * each for rank in ranks],
            losses=(),
            build=partial(_build_cp, layer, self.turns, most),
            size=lambda rank: checked_rank(rank, most) * each,
            error=lambda built: relative_error(weight.flatten(1), dense_matrix(layer, built)),
        )


_CP_OTHERS = ("ncij,cr,ir,jr->nr", "ncij,nr,ir,jr->cr", "ncij,nr,cr,jr->ir", "ncij,nr,cr,ir->jr")


def cp_factors(weight: Tensor, rank: int, turns: int) -> list[Tensor]:
    """Factors [N, r], [C, r], [h, r], [w, r] of a kernel by alternating least squares, float64.

    With the others held, the best factor F of a mode solves F H = M: M the kernel multiplied by
    the others, H the product (element by element) of their Gram matrices.
    """
    wide = weight.double()
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(d, rank, generator=generator, dtype=torch.double) for d in wide.shape]
    found = [factor.to(wide.device) for factor in start]
    square, before = float(wide.square().sum()), float("inf")
    for _ in range(turns):
        for mode, equation in enumerate(_CP_OTHERS):
            others = [factor for at, factor in enumerate(found) if at != mode]
            right = torch.einsum(equation, wide, *others)
            left = torch.stack([f.T @ f for f in others]).prod(0)
            # A little on the diagonal: components that cancel each other would grow without end.
            left += 1e-10 * left.diagonal().mean() * torch.eye(rank, device=left.device)
            found[mode] = torch.linalg.lstsq(left, right.T).solution.T
        error = float((wide - torch.einsum("nr,cr,ir,jr->ncij", *found)).square().sum())
        if before - error <= 1e-9 * square:
            break
        before = error
    norms = torch.stack([factor.norm(dim=0) for factor in found])
    spread = norms.prod(0) ** (1 / 4)
    return [f * (spread / torch.where(n > 0, n, 1.0)) for f, n in zip(found, norms, strict=True)]


def _build_cp(layer: nn.Conv2d, turns: int, most: int, rank: AnyRank) -> nn.Module:
    checked_rank(rank, most)
    dtype = layer.weight.dtype
    outputs, inputs, rows, columns = (
        factor.to(dtype) for factor in cp_factors(layer.weight.detach(), rank, turns)
    )
    return LowRankConv2d(
        pointwise(inputs.T),
        _of_each_channel(layer, rows.T[:, None, :, None], 0),
        _of_each_channel(layer, columns.T[:, None, None, :], 1),
        pointwise(outputs, _bias(layer)),
    ).train(layer.training)


def _of_each_channel(layer: nn.Conv2d, weight: Tensor, at: int) -> nn.Conv2d:
    """The part of `layer` along one side of the image, each channel by itself."""

    def side(value, otherwise: int):
        if isinstance(value, str):
            return value  # 'same' and 'valid' hold for each side
        return tuple(v if i == at else otherwise for i, v in enumerate(value))

    made = nn.Conv2d(
        len(weight),
        len(weight),
        weight.shape[2:],
        side(layer.stride, 1),
        side(layer.padding, 0),
        side(layer.dilation, 1),
        groups=len(weight),
        bias=False,
        padding_mode=layer.padding_mode,
        device="meta",
    )
    made.weight = nn.Parameter(weight.contiguous())
    return made


def _bias(layer: nn.Conv2d) -> Tensor | None:
    return None if layer.bias is None else layer.bias.detach().clone()
