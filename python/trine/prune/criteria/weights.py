"""Criteria that look at the weights alone."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trine.prune.criteria.base import Criterion

__all__ = ["Change", "Magnitude", "Random"]


class Magnitude(Criterion):
    """|w|^norm (Han et al. 2015, arXiv:1506.02626).

    The scores of a group are added, so that `norm` 1 ranks groups by their L1 and 2 by their L2
    norm; for single weights both are the same.

    Raises ValueError for another norm.
    """

    def __init__(self, norm: int = 1) -> None:
        if norm not in (1, 2):
            raise ValueError(f"Magnitude: norm must be 1 or 2, it is {norm!r}")
        self.norm = norm

    def scores(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        return {name: layer.weight.detach().abs().pow(self.norm) for name, layer in layers.items()}


class Random(Criterion):
    """Uniform in [0, 1): the control that a criterion has to beat. The same draws everywhere."""

    def __init__(self, seed: int = 0) -> None:
        self._draws = torch.Generator().manual_seed(seed)

    def scores(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        return {
            name: torch.rand(layer.weight.shape, generator=self._draws).to(layer.weight.device)
            for name, layer in layers.items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {"draws": self._draws.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._draws.set_state(state["draws"].cpu())


class Change(Criterion):
    """|w - w0|: how far a weight has come from where it started (Zhou et al. 2019,
    arXiv:1905.01067)."""

    def __init__(self) -> None:
        self._start: dict[str, Tensor] = {}

    def start(self, layers: Mapping[str, nn.Module]) -> None:
        self._start = {name: layer.weight.detach().clone() for name, layer in layers.items()}

    def scores(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        return {
            name: (layer.weight.detach() - self._start[name]).abs()
            for name, layer in layers.items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {"start": self._start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, weight in state["start"].items():
            self._start[name].copy_(weight)
