"""Pruning in one go with calibration data and no training: Wanda and SparseGPT, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trine.calibration import (
    ColumnNorm,
    SecondMoment,
    Statistic,
    calibrate,
    from_matrix,
    in_turn,
    solve_columns,
    weight_matrix,
)
from trine.prune.criteria.calibrated import wanda_scores
from trine.prune.layers import check_finite, prunable_layers

__all__ = ["sparsegpt", "wanda"]

Amount = float | tuple[int, int]
Patterns = str | Iterable[str]


def wanda(
    model: nn.Module,
    data: Any,
    amount: Amount,
    *,
    layers: Patterns = "*",
    skip: Patterns = (),
    sequential: bool = True,
    batches: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> nn.Module:
    """A copy of `model` whose layers keep the weights of largest |w_ij| * ||x_j||_2 in each row.

    No weight that is kept changes (Sun et al. 2023, arXiv:2306.11695).

    Args:
        model: any module; it is not touched.
        data, batches: what the model is called with, as for `trine.calibrate`.
        amount: the share of each row that becomes 0, or (n, m): of every m consecutive columns the
            n best stay, so (2, 4) for `trine.prune.as_sparse24`.
        layers, skip: patterns of names, see `prunable_layers`. Convolutions are nn.Conv2d alone.
        sequential: each layer is judged by the inputs that it has with the layers before it
            pruned, as published, which takes a pass over the data for each; else by those of the
            dense model, in one pass.
        progress: called with the number of layers that are done.

    Raises:
        ValueError: an amount outside (0, 1) or no n < m, a layer that cannot be pruned or that no
            data reached, NaN in weights or inputs, no data. The model is untouched.
    """
    _check_amount(amount)

    def change(weight: Tensor, found: ColumnNorm, group: int | None) -> Tensor:
        norm = found.norm if group is None else found.norm[group]
        kept = keep(wanda_scores(weight, norm), amount, rows_apart=True)
        return torch.where(kept, weight, 0)

    steps = _Steps(model, data, layers, skip, sequential, batches, progress)
    return steps.apply(ColumnNorm, change)


def sparsegpt(
    model: nn.Module,
    data: Any,
    amount: Amount,
    *,
    layers: Patterns = "*",
    skip: Patterns = (),
    sequential: bool = True,
    damping: float = 0.01,
    block: int = 128,
    batches: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> nn.Module:
    """A copy of `model`, pruned, whose remaining weights make up for those that are gone.

    Columns go from left to right: the weights with the smallest w^2 / U_jj^2 become 0 and the
    columns behind them change so that the layer's output changes least, see
    `trine.calibration.solve_columns` (Frantar & Alistarh 2023, arXiv:2301.00774).

    Args:
        amount: the share of the weights of each `block` of columns that becomes 0, or (n, m): in
            each row, of every m consecutive columns n stay.
        damping, block: as published; see `trine.calibration.solve_columns`.
        model, data, layers, skip, sequential, batches, progress: as for `wanda`.

    Raises:
        ValueError: as `wanda`, and where the data leave the second moments singular.
    """
    _check_amount(amount)

    def change(weight: Tensor, found: SecondMoment, group: int | None) -> Tensor:
        gram = found.gram if group is None else found.gram[group]
        without_input = gram.diagonal() == 0
        rule = _LeastError(amount, block)
        return solve_columns(
            weight.masked_fill(without_input, 0), gram, rule, damping=damping, block=block
        )

    steps = _Steps(model, data, layers, skip, sequential, batches, progress)
    return steps.apply(SecondMoment, change)


class _LeastError:
    """The rule of SparseGPT for `solve_columns`: a mask for each group of columns."""

    def __init__(self, amount: Amount, block: int) -> None:
        self.amount = amount
        self.group = amount[1] if isinstance(amount, tuple) else block
        self._first, self._kept = 0, torch.empty(0)

    def start(self, first: int, weight: Tensor, diagonal: Tensor) -> None:
        self._first = first
        self._kept = keep((weight / diagonal).square(), self.amount, rows_apart=False)

    def column(self, j: int, weight: Tensor) -> Tensor:
        return torch.where(self._kept[:, j - self._first], weight, 0)


class _Steps:
    """Layers pruned one after the other, each with the statistic of its input."""

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        layers: Patterns,
        skip: Patterns,
        sequential: bool,
        batches: int | None,
        progress: Callable[[int], None],
    ) -> None:
        from trine.compress.layers import copy_model  # a package that imports much: when needed

        self.names = list(prunable_layers(model, layers, skip))
        for name in self.names:
            check_finite(name, model.get_submodule(name))
        self.model = copy_model(model, {})
        self.data, self.batches = data, batches
        self.sequential, self.progress = sequential, progress

    def apply(
        self,
        statistic: Callable[[], Statistic],
        change: Callable[[Tensor, Any, int | None], Tensor],
    ) -> nn.Module:
        """`change(weight [N, K], statistic, group)` for every layer, or group of a convolution."""
        for _, layer, found in self._layers(statistic):
            weight = weight_matrix(layer)
            if weight.dim() == 2:
                changed = change(weight, found, None)
            else:
                changed = torch.stack([change(w, found, g) for g, w in enumerate(weight)])
            with torch.no_grad():
                layer.weight.copy_(from_matrix(layer, changed))
        return self.model

    def _layers(
        self, statistic: Callable[[], Statistic]
    ) -> Iterator[tuple[str, nn.Module, Statistic]]:
        if self.sequential:
            yield from in_turn(
                self.model,
                self.data,
                statistic,
                layers=self.names,
                batches=self.batches,
                progress=self.progress,
            )
            return
        found = calibrate(self.model, self.data, statistic, layers=self.names, batches=self.batches)
        for done, (name, gathered) in enumerate(found.items(), start=1):
            yield name, self.model.get_submodule(name), gathered
            self.progress(done)


def keep(scores: Tensor, amount: Amount, *, rows_apart: bool) -> Tensor:
    """Which entries of `scores` [N, K] stay: the highest; among equals the first.

    amount (n, m): in each row n of every m consecutive columns (of a last, shorter group at most
    n). A share: all but floor(share * size) of each row, or of the whole.
    """
    if isinstance(amount, tuple):
        n, m = amount
        k = scores.shape[1]
        padded = nn.functional.pad(scores, (0, -k % m), value=-torch.inf)
        groups = padded.unflatten(1, (-1, m))
        return _highest(groups, n).flatten(1)[:, :k]
    compared = scores if rows_apart else scores.reshape(1, -1)
    size = compared.shape[1]
    return _highest(compared, size - int(amount * size)).view_as(scores)


def _highest(scores: Tensor, count: int) -> Tensor:
    """True for the `count` highest along the last dimension."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def _check_amount(amount: Amount) -> None:
    if isinstance(amount, tuple):
        if (
            len(amount) == 2
            and all(isinstance(i, int) for i in amount)
            and 0 < amount[0] < amount[1]
        ):
            return
        raise ValueError(f"amount is {amount}; a pattern is (n, m) with 0 < n < m, such as (2, 4)")
    if not isinstance(amount, float) or not 0 < amount < 1:
        raise ValueError(
            f"amount is {amount!r}; it must be a share between 0 and 1, or a pattern such as (2, 4)"
        )
