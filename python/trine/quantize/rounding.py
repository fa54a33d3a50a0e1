"""From the weight of a layer and what its inputs were like to codes: nearest, or by GPTQ."""

from __future__ import annotations

import torch
from torch import Tensor

from trine.quantize.groups import split_group
from trine.quantize.weights import dense, weight_rule

# Choices of a recipe whose codes lie on a grid (some also in groups): the largest code.
GRIDS = {"int8": 127, "int8-static": 127, "int8-weight": 127, "ternary": 1, "ternary-twn": 1}


def nearest(choice: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, K] of `weight` [N, K] by the choice's rule, and scale float32.

    The scale is [N], [1] or, where the choice has a group size, [N, K / group].
    """
    return weight_rule("int8" if choice == "int8-static" else choice)(weight)


def gptq(
    choice: str, weight: Tensor, gram: Tensor, *, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """The same, with each column's rounding error made up for by the columns after it.

    GPTQ (Frantar et al. 2023, arXiv:2210.17323) on the grid that the rule lays over `weight`:
    columns are rounded to it in turn, those of the largest mean square first (its "act order"), see
    `trine.calibration.solve_columns`. Minimises ||X (W - W_q)^T||, not ||W - W_q||. With groups
    the scales are those of the weight as it was, too (its "static groups").

    Args:
        weight: [N, K].
        gram: X^T X of the layer's inputs, [K, K] (`trine.calibration.SecondMoment`).
        damping: see `solve_columns`.

    Raises ValueError as `solve_columns` does.
    """
    from trine.calibration import solve_columns  # it builds on this package

    _, scale = nearest(choice, weight)
    wide = weight.float()
    order = gram.diagonal().argsort(descending=True, stable=True)
    steps = dense(torch.ones_like(wide), scale.to(weight.device))[:, order]
    grid = _Grid(steps, GRIDS[split_group(choice)[0]])
    values = solve_columns(wide[:, order], gram[order][:, order], grid, damping=damping)
    codes = torch.empty_like(values)
    codes[:, order] = grid.codes(values, steps)
    return codes.to(torch.int8), scale


class _Grid:
    """The levels step * (-largest .. largest), as a `ColumnRule`: a step [N, K] for each weight."""

    group = None

    def __init__(self, steps: Tensor, largest: int) -> None:
        self.steps, self.largest = steps, largest

    def start(self, first: int, weight: Tensor, diagonal: Tensor) -> None:
        """Nothing: the steps stay those of the weight as it was."""

    def codes(self, weight: Tensor, step: Tensor) -> Tensor:
        """Of a row of zeros, whose step is 0, all are 0."""
        steps = torch.where(step > 0, weight / step, 0.0)
        return steps.round().clamp(-self.largest, self.largest)

    def column(self, j: int, weight: Tensor) -> Tensor:
        step = self.steps[:, j]
        return self.codes(weight.float(), step) * step
