"""An order of columns in which 2:4 keeps more magnitude (Pool & Yu 2021, NeurIPS).

2:4 keeps the two largest of every four consecutive columns of a row. Which columns stand together
is free wherever the layers before can be permuted alike, so that large weights need not compete.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

__all__ = ["kept_magnitude", "search_permutation"]

# Eight columns, i.e. two stripes of four, can be divided into two stripes in 35 ways; the first is
# the one that there is. Each stripe is two pairs of columns, and there are 28 pairs.
_DIVISIONS = [
    first + tuple(i for i in range(8) if i not in first)
    for first in combinations(range(8), 4)
    if 0 in first
]
_PAIRS = list(combinations(range(8), 2))
_LEFT, _RIGHT = torch.tensor(_PAIRS).T
_HALVES = torch.tensor(
    [[_PAIRS.index(way[i : i + 2]) for i in (0, 2, 4, 6)] for way in _DIVISIONS]
).T
_STRIPE_PAIRS = 256  # looked at in one escape: less than a second
_ELEMENTS = 1 << 16  # of the columns that are looked at together: they stay in the cache


def kept_magnitude(matrix: Tensor) -> float:
    """The share of sum |w| that stays when `matrix` [R, C] is pruned to 2:4; 1 where all is 0."""
    magnitude = matrix.detach().abs().double()
    total = magnitude.sum()
    padded = torch.nn.functional.pad(magnitude, (0, -magnitude.shape[1] % 4))
    kept = padded.unflatten(1, (-1, 4)).topk(2, dim=2).values.sum()
    return float(kept / total) if total > 0 else 1.0


def search_permutation(
    matrix: Tensor,
    *,
    escapes: int = 16,
    seed: int = 0,
    progress: Callable[[float], None] = lambda kept: None,
) -> Tensor:
    """An order of the columns of `matrix` [R, C] in which 2:4 keeps more of it.

    `matrix[:, order]` keeps at least as much as `matrix`. Greedy: of all exchanges of two columns
    of different stripes of four those that gain most are carried out, disjoint ones together, until
    none gains. Out of such a local optimum it escapes by looking at all 35 divisions of the eight
    columns of two stripes, for many pairs of stripes; where none of them gains, columns of a
    quarter of the stripes are exchanged at random, which is taken back where the search from there
    does not end higher.

    Columns behind the last whole four stay where they are.

    Args:
        matrix: weights, or their scores; the rows of several layers one below the other. Signs do
            not matter.
        escapes: how many times it leaves a local optimum.
        seed: of the exchanges.
        progress: called with the share of the magnitude that is kept, after each escape.

    Returns:
        int64 [C]: `order[i]` is the column that goes to place i.

    Raises:
        ValueError: no matrix, or NaN or infinity in it.
    """
    if matrix.dim() != 2 or not torch.isfinite(matrix.detach()).all():
        raise ValueError(
            "search_permutation takes a finite matrix [R, C]; got "
            f"{list(matrix.shape)}" + (" with NaN or infinity" if matrix.dim() == 2 else "")
        )
    order = torch.arange(matrix.shape[1])
    stripes = matrix.shape[1] // 4
    if stripes < 2:
        return order
    state = _State(matrix.detach().abs().float().T[: 4 * stripes].contiguous())
    state.converge()
    draws = torch.Generator().manual_seed(seed)
    for _ in range(escapes):
        if state.divide(draws):
            state.converge()
        else:
            trial = state.copy()
            trial.exchange_any(draws)
            trial.converge()
            state = trial if trial.kept() > state.kept() else state
        progress(kept_magnitude(matrix[:, state.order.to(matrix.device)]))
    order[: 4 * stripes] = state.order
    return order


class _State:
    """An order [C] of columns, and what 2:4 would keep with any column in any place.

    Without its place p, a stripe has three columns; with t1 >= t2 the two largest magnitudes of
    them in a row, it keeps t1 + max(t2, x) of that row when x comes to p. Summed over the rows,
    max(t2, x) = (t2 + x + |t2 - x|) / 2 is a distance of two columns, so all places and all columns
    are one `torch.cdist`.
    """

    def __init__(self, columns: Tensor) -> None:
        self.columns = columns  # magnitudes [C, R]
        self.size = columns.sum(1)
        count = len(columns)
        self.order = torch.arange(count)
        self.stripe = torch.arange(count) // 4
        self.with_column = columns.new_empty(count, count)  # [place, column]
        self._update(torch.arange(count // 4))
        # A gain below the rounding of its sums could come and go for ever.
        self.least = 1e-5 * float(self.size.max())

    def copy(self) -> _State:
        same = copy.copy(self)
        same.order, same.with_column = self.order.clone(), self.with_column.clone()
        return same

    def kept(self) -> float:
        stripes = self.columns[self.order].unflatten(0, (-1, 4))
        return float(stripes.topk(2, dim=1).values.sum(dtype=torch.float64))

    def converge(self) -> None:
        """Exchange columns until nothing gains."""
        while True:
            swapped = self.with_column[:, self.order]  # [place, place whose column comes]
            now = swapped.diagonal()
            gain = swapped + swapped.T - now - now[:, None]
            gain[self.stripe[:, None] >= self.stripe] = 0
            found = (gain > self.least).nonzero()
            if not len(found):
                return
            best = gain[found[:, 0], found[:, 1]].argsort(descending=True)
            free = [True] * (len(self.order) // 4)
            changed = []
            for one, other in found[best].tolist():
                if free[one // 4] and free[other // 4]:
                    free[one // 4] = free[other // 4] = False
                    self._exchange(one, other)
                    changed += [one // 4, other // 4]
            self._update(torch.tensor(changed))

    def divide(self, draws: torch.Generator) -> bool:
        """Divide the best of some pairs of stripes anew; whether any gained."""
        stripes = len(self.order) // 4
        pairs = torch.triu_indices(stripes, stripes, 1)
        some = torch.randperm(pairs.shape[1], generator=draws)[:_STRIPE_PAIRS]
        of_stripe, changed = self.order.view(-1, 4), []
        for part in pairs[:, some].split(max(1, _ELEMENTS // (8 * self.columns.shape[1])), 1):
            eight = of_stripe[part.T].flatten(1)
            kept = _kept_by_division(self.columns[eight])
            best = kept.max(1)
            for i in (best.values - kept[:, 0]).argsort(descending=True).tolist():
                one, other = part[:, i].tolist()
                if best.values[i] - kept[i, 0] > self.least and not {one, other} & set(changed):
                    divided = eight[i, _DIVISIONS[best.indices[i]]]
                    of_stripe[one], of_stripe[other] = divided[:4], divided[4:]
                    changed += [one, other]
        if changed:
            self._update(torch.tensor(changed))
        return bool(changed)

    def exchange_any(self, draws: torch.Generator) -> None:
        """Exchange columns of a quarter of the stripes at random."""
        stripes = torch.randperm(len(self.order) // 4, generator=draws)
        stripes = stripes[: 2 * max(1, len(stripes) // 8)]
        places = 4 * stripes + torch.randint(4, stripes.shape, generator=draws)
        for one, other in places.view(-1, 2).tolist():
            self._exchange(one, other)
        self._update(stripes)

    def _exchange(self, one: int, other: int) -> None:
        self.order[[one, other]] = self.order[[other, one]]

    def _update(self, stripes: Tensor) -> None:
        """Bring `with_column` up to date for the places of some stripes."""
        four = self.columns[self.order.view(-1, 4)[stripes]]  # [stripes, 4, R]
        others = four[:, [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]].flatten(0, 1)
        first, second = others.topk(2, dim=1).values.unbind(1)  # [places, R]
        larger = torch.cdist(second, self.columns, p=1) + second.sum(1)[:, None] + self.size
        places = (4 * stripes[:, None] + torch.arange(4)).flatten()
        self.with_column[places] = first.sum(1)[:, None] + larger / 2


def _kept_by_division(eight: Tensor) -> Tensor:
    """What 2:4 keeps of eight columns [B, 8, R] with each division into two stripes: [B, 35]."""
    a, b = eight[:, _LEFT], eight[:, _RIGHT]
    largest, both = torch.maximum(a, b), a + b
    kept = eight.new_zeros(len(eight), len(_DIVISIONS))
    for one, other in (_HALVES[:2], _HALVES[2:]):
        # The two largest of four: both of one pair, both of the other, or the largest of each.
        top = torch.maximum(both[:, one], both[:, other])
        kept += torch.maximum(top, largest[:, one] + largest[:, other]).sum(2)
    return kept
