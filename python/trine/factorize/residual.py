"""A linear layer as low rank plus a 2:4-sparse rest."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from trine.calibration import SecondMoment, weight_matrix
from trine.factorize.matrices import directions, factors, relative_error, root_of
from trine.factorize.plan import AnyRank, Plan
from trine.factorize.svd import Svd, checked_rank, dense_matrix, from_factors
from trine.nn import Sparse24Linear
from trine.quantize.weights import two_of_four


class SvdWithSparse24(Svd):
    """W = L + S: L of rank r in two linear layers, S with two of every four weights of a row.

    L and S are found in turns, each the best for what the other leaves: S takes the two of four
    entries of W - L that are largest (by |s_ij| * ||x_j||, as Wanda does, where moments are given),
    L the best of rank r of W - S, as `Svd` does. The best of all turns is kept. What is made is a
    `LowRankLinear` with a `Sparse24Linear` as its `residual`, which is packed and does not train;
    the factors do. It is for nn.Linear and Conv1D, and for `Rank` and `Speedup`: what a rank loses
    is known only when it is built. (LoSparse, arXiv:2306.11222; OATS, arXiv:2409.13652.)

    Args:
        moments: as for `Svd`.
        turns: how often each is found.
    """

    name = "svd + 2:4"
    kinds = (nn.Linear,)

    def __init__(
        self, moments: Mapping[str, SecondMoment] | None = None, *, turns: int = 8
    ) -> None:
        super().__init__(moments)
        if turns < 1:
            raise ValueError(f"SvdWithSparse24: turns is {turns}; it must be at least 1")
        self.turns = turns

    def plan(self, name: str, layer: nn.Module) -> Plan:
        weight, gram = weight_matrix(layer), self.gram(name, layer)
        n, k = weight.shape

        def size(rank: AnyRank) -> int:
            return checked_rank(rank, min(n, k)) * (n + k) + n * k // 2

        ranks = range(1, min(n, k) + 1)
        return Plan(
            dense=n * k,
            ranks=ranks,
            parameters=[size(rank) for rank in ranks],
            losses=(),
            build=partial(_build, layer, gram, self.turns),
            size=size,
            error=lambda built: relative_error(weight, dense_matrix(layer, built), gram),
        )


def _build(layer: nn.Module, gram: Tensor | None, turns: int, rank: AnyRank) -> nn.Module:
    weight = weight_matrix(layer)
    checked_rank(rank, min(weight.shape))
    root = norms = None
    if gram is not None:
        root, norms = root_of(gram), gram.diagonal().double().clamp(min=0).sqrt()
    wide = weight.double()
    sparse, best = torch.zeros_like(wide), (float("inf"), None)
    for _ in range(turns):
        u, _ = directions(wide - sparse, root)
        second, first = factors(wide - sparse, u[:, :rank])
        rest = wide - second @ first
        sparse = rest * two_of_four(rest if norms is None else rest * norms)
        error = relative_error(wide, second @ first + sparse, gram)
        if error < best[0]:
            best = error, (first, second, sparse)
    first, second, sparse = best[1]
    residual = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    residual.weight = nn.Parameter(sparse.to(weight.dtype))
    return from_factors(layer, first, second, Sparse24Linear.from_linear(residual))
