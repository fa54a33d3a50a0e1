"""How much each layer suffers from being pruned: remove, evaluate, restore, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from trine.prune.criteria.base import Criterion
from trine.prune.criteria.weights import Magnitude
from trine.prune.granularity import Granularity
from trine.prune.layers import check_finite, prunable_layers
from trine.prune.pruner import Pruner
from trine.prune.scope import PerLayer

__all__ = ["Sensitivity", "sensitivity"]

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Sensitivity:
    """The curve of each layer: the model's score with that layer alone pruned at each ratio.

    Prints as a table. `draw(path)` makes a picture of it; `trine.prune.budget_ratios` chooses a
    ratio for each layer.
    """

    ratios: tuple[float, ...]
    dense: float  # the score of the model as it is
    scores: Mapping[str, tuple[float, ...]]  # by layer, for each of `ratios`

    def losses(self) -> dict[str, tuple[float, ...]]:
        """What each layer loses at ratio 0 and at each of `ratios`: how far the score falls.

        Pruning more never counts as losing less: where a score rises again, by chance, the loss
        stays what it was.
        """
        return {
            name: tuple(accumulate((0.0, *(self.dense - score for score in curve)), max))
            for name, curve in self.scores.items()
        }

    def __str__(self) -> str:
        width = max(map(len, self.scores))
        head = "  ".join(f"{ratio:>7.0%}" for ratio in self.ratios)
        lines = [f"{'score, pruned by':{width}}  {'0%':>7}  {head}"]
        for name, curve in self.scores.items():
            values = "  ".join(f"{value:7.4g}" for value in (self.dense, *curve))
            lines.append(f"{name:{width}}  {values}")
        return "\n".join(lines)

    def draw(self, path: str | Path) -> None:
        """Write a picture of the curves, in the format that the path ends with (.svg, .png, ...).

        Raises ImportError where matplotlib is not installed.
        """
        from trine.prune.picture import draw_curves

        draw_curves(self.ratios, self.dense, self.scores, Path(path))


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    ratios: Iterable[float] = RATIOS,
    criterion: Criterion | None = None,
    granularity: Granularity | None = None,
    layers: str | Iterable[str] = "*",
    skip: str | Iterable[str] = (),
    progress: Callable[[int], None] = lambda done: None,
) -> Sensitivity:
    """Prune each layer alone at each ratio, evaluate, and put its bits back.

    Args:
        model: is pruned in place and restored, also where `evaluate` fails or is interrupted.
        evaluate: called with the model, returns a score, higher is better. Modes, data and devices
            are its own affair; it is called once for each layer and ratio, and once before.
        ratios: shares of a layer's groups that are removed, in (0, 1), ascending.
        criterion: what a weight is worth, `Magnitude()` by default; asked once, about the dense
            model.
        granularity: what is removed as one, `Weight()` by default.
        layers, skip: patterns of names, see `prunable_layers`.
        progress: called after each evaluation with the number of those that are done.

    Raises:
        ValueError: ratios out of order or range, a layer that cannot be pruned so far, NaN in
            weights, a score that is NaN. The model is as it was.
    """
    steps = tuple(ratios)
    if not steps or list(steps) != sorted(set(steps)) or not steps[0] > 0 or not steps[-1] < 1:
        raise ValueError(f"sensitivity: ratios must ascend between 0 and 1; got {list(steps)}")
    chosen = prunable_layers(model, layers, skip)
    for name, layer in chosen.items():
        check_finite(name, layer)
    criterion = criterion or Magnitude()
    criterion.start(chosen)
    known = _Known(criterion.scores(model, chosen))
    done = 0

    def score(what: str) -> float:
        nonlocal done
        value = float(evaluate(model))
        if math.isnan(value):
            raise ValueError(f"sensitivity: evaluate returned NaN for {what}")
        done += 1
        progress(done)
        return value

    dense = score("the dense model")
    scores: dict[str, tuple[float, ...]] = {}
    for name, layer in chosen.items():
        curve = []
        for ratio in steps:
            with _restored(layer):
                Pruner(model, known, granularity, PerLayer(ratio), layers=name)
                curve.append(score(f"layer '{name}' pruned by {ratio:.0%}"))
        scores[name] = tuple(curve)
    return Sensitivity(steps, dense, scores)


class _Known(Criterion):
    """Scores that were computed before."""

    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        self._known = scores

    def scores(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        return {name: self._known[name] for name in layers}


@contextmanager
def _restored(layer: nn.Module) -> Iterator[None]:
    """All parameters of the layer have the same bits afterwards."""
    before = {p: p.detach().clone() for p in layer.parameters(recurse=False)}
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in before.items():
                parameter.copy_(values)
