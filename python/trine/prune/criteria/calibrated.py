"""Criteria that look at the inputs of the layers: calibration data says which weights matter."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trine.calibration import (
    ColumnNorm,
    SecondMoment,
    calibrate,
    from_matrix,
    inverse_factor,
    weight_matrix,
)
from trine.prune.criteria.base import Criterion

__all__ = ["SparseGPT", "Wanda"]


class Wanda(Criterion):
    """|w_ij| * ||x_j||_2, x_j the layer's j-th input over the data (Sun et al. 2023,
    arXiv:2306.11695).

    Meant to be compared within each row of the weight, or as N:M. Every call of `scores` runs the
    model over the data once. `trine.prune.wanda` does the whole, layer by layer.

    Args:
        data, batches: as for `trine.calibrate`.
    """

    def __init__(self, data: Any, *, batches: int | None = None) -> None:
        self.data, self.batches = data, batches

    def scores(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        found = calibrate(model, self.data, ColumnNorm, layers=layers, batches=self.batches)
        return {
            name: from_matrix(layer, wanda_scores(weight_matrix(layer), found[name].norm))
            for name, layer in layers.items()
        }


class SparseGPT(Criterion):
    """w_ij^2 / U_jj^2: how much the error of the layer's output grows at the least when w_ij
    becomes 0 and the columns behind it make up for it (Frantar & Alistarh 2023, arXiv:2301.00774).

    U comes from the inputs of the layer, see `trine.calibration.inverse_factor`. These are the
    scores alone; `trine.prune.sparsegpt` does the whole, with the weights updated.

    Args:
        data, batches: as for `trine.calibrate`.
        damping: see `trine.calibration.solve_columns`.
    """

    def __init__(self, data: Any, *, batches: int | None = None, damping: float = 0.01) -> None:
        self.data, self.batches, self.damping = data, batches, damping

    def scores(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        found = calibrate(model, self.data, SecondMoment, layers=layers, batches=self.batches)
        return {
            name: from_matrix(layer, self._of_layer(layer, found[name].gram))
            for name, layer in layers.items()
        }

    def _of_layer(self, layer: nn.Module, gram: Tensor) -> Tensor:
        weight = weight_matrix(layer)
        wide = torch.promote_types(weight.dtype, torch.float32)
        diagonal = inverse_factor(gram, self.damping).diagonal(dim1=-2, dim2=-1)
        return (weight.to(wide) / diagonal.to(wide).unsqueeze(-2)).square()


def wanda_scores(weight: Tensor, norm: Tensor) -> Tensor:
    """|w_ij| * norm_j for a weight [..., N, K], in float32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(wide).abs() * norm.to(wide).unsqueeze(-2)
