"""Statistics of a layer's input, gathered from rows as they come: [M, K] or, of groups, [G, M, K].

Any object with `update(rows)` is one. Those here hold a few tensors on the device of the rows; with
groups every result has the groups in front. Sums are kept in float64 unless said otherwise: they
run over thousands of batches.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Statistic(Protocol):
    """Takes rows as they come. They are without NaN and infinity, and there is at least one."""

    def update(self, rows: Tensor) -> None: ...


class ColumnNorm:
    """||x_j||_2 of every column j: `norm` float64 [K], over `rows` rows."""

    def __init__(self) -> None:
        self.rows = 0
        self.square: Tensor | float = 0.0

    def update(self, rows: Tensor) -> None:
        self.rows += rows.shape[-2]
        self.square = self.square + rows.double().square().sum(-2)

    @property
    def norm(self) -> Tensor:
        return self.square.sqrt()


class ColumnMean:
    """E[x_j] and Var[x_j] (biased) of every column j: `mean` and `variance`, float64 [K].

    The moments of batches are combined as Chan et al. (1979) do, so that nothing cancels.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.mean: Tensor | float = 0.0
        self._spread: Tensor | float = 0.0

    def update(self, rows: Tensor) -> None:
        wide, count = rows.double(), rows.shape[-2]
        mean, before = wide.mean(-2), self.rows
        self.rows += count
        step = mean - self.mean
        spread = (wide - mean.unsqueeze(-2)).square().sum(-2)
        self._spread = self._spread + spread + step.square() * (before * count / self.rows)
        self.mean = self.mean + step * (count / self.rows)

    @property
    def variance(self) -> Tensor:
        return self._spread / self.rows


class ColumnRange:
    """min, max and largest magnitude of every column: `low`, `high`, `absmax` [K] in x's dtype."""

    def __init__(self) -> None:
        self.rows = 0
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        self.rows += rows.shape[-2]
        low, high = rows.amin(-2), rows.amax(-2)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    @property
    def absmax(self) -> Tensor:
        return torch.maximum(self.low.abs(), self.high.abs())


class SecondMoment:
    """X^T X, the sum (not the mean) over `rows` rows: `gram` [K, K], of groups [G, K, K].

    dtype: of the products and of the sum; float32, or float64 where twice the memory and time are
    worth it.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.rows, self.dtype = 0, dtype
        self.gram: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        wide = rows.to(self.dtype)
        self.rows += rows.shape[-2]
        product = wide.mT @ wide
        self.gram = product if self.gram is None else self.gram.add_(product)


class Several:
    """Several statistics of the same rows: `calibrate(..., lambda: Several(a=ColumnNorm(), ...))`.

    Each is an attribute of its name.
    """

    def __init__(self, **statistics: Statistic) -> None:
        self._all = tuple(statistics.values())
        vars(self).update(statistics)

    def update(self, rows: Tensor) -> None:
        for statistic in self._all:
            statistic.update(rows)
