"""From the weight of a layer and what its inputs were like to codes: nearest, or by GPTQ."""

from __future__ import annotations

import torch
from torch import Tensor

from trine.quantize.weights import WEIGHT_RULES

# Choices of a recipe whose codes lie on a grid: the largest code.
GRIDS = {"int8": 127, "int8-static": 127, "ternary": 1, "ternary-twn": 1}


def nearest(choice: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, K] and scale float32 [N] or [1] of `weight` [N, K], by the choice's rule."""
    return WEIGHT_RULES[_rule(choice)](weight)


def gptq(
    choice: str, weight: Tensor, gram: Tensor, *, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """The same, with each column's rounding error made up for by the columns after it.

    GPTQ (Frantar et al. 2023, arXiv:2210.17323) on the grid that the rule lays over `weight`:
    columns are rounded to it in turn, those of the largest mean square first (its "act order"), see
    `trine.calibration.solve_columns`. Minimises ||X (W - W_q)^T||, not ||W - W_q||.

    Args:
        weight: [N, K].
        gram: X^T X of the layer's inputs, [K, K] (`trine.calibration.SecondMoment`).
        damping: see `solve_columns`.

    Raises ValueError as `solve_columns` does.
    """
    from trine.calibration import solve_columns  # it builds on this package

    _, scale = nearest(choice, weight)
    grid = _Grid(scale.to(weight.device), GRIDS[choice])
    order = gram.diagonal().argsort(descending=True, stable=True)
    ordered = weight.float()[:, order]
    values = solve_columns(ordered, gram[order][:, order], grid, damping=damping)
    codes = torch.empty_like(values)
    codes[:, order] = grid.codes(values.T).T
    return codes.to(torch.int8), scale


def _rule(choice: str) -> str:
    return "int8" if choice == "int8-static" else choice


class _Grid:
    """The levels scale * (-largest .. largest), as a `ColumnRule`: scale [N] or [1]."""

    group = None

    def __init__(self, scale: Tensor, largest: int) -> None:
        self.scale, self.largest = scale, largest

    def start(self, first: int, weight: Tensor, diagonal: Tensor) -> None:
        """Nothing: the scale stays that of the weight as it was."""

    def codes(self, weight: Tensor) -> Tensor:
        """Of values [..., N]; of a row of zeros, whose scale is 0, all are 0."""
        steps = torch.where(self.scale > 0, weight / self.scale, 0.0)
        return steps.round().clamp(-self.largest, self.largest)

    def column(self, j: int, weight: Tensor) -> Tensor:
        return self.codes(weight.float()) * self.scale
