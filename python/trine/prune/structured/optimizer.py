"""An optimiser that goes on with the smaller model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from trine.prune.structured.remove import cut
from trine.prune.structured.report import RemovalReport


def hand_over(optimizer: torch.optim.Optimizer, model: nn.Module, small: nn.Module) -> None:
    """Let `optimizer`, which trained `model`, train `small` with the state of what is left.

    In place, so that schedules of the learning rate go on. Under DDP wrap `small` anew; every
    process has to remove the same.

    Args:
        small: what `prune_structured` or `remove` made of `model`.

    Raises:
        ValueError: `small` is of another model; a parameter that `model` does not have; a state
            that does not have its parameter's shape (as Adafactor's has not). The optimiser is then
            as it was.
    """
    report = getattr(small, "removal_report", None)
    ours, theirs = dict(model.named_parameters()), dict(small.named_parameters())
    if not isinstance(report, RemovalReport) or ours.keys() != theirs.keys():
        raise ValueError("hand_over takes a model and what prune_structured or remove made of it")
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's holds the real one
    names = {parameter: name for name, parameter in ours.items()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(parameter not in names for parameter in held):
        raise ValueError("the optimiser trains parameters that are not the model's")
    state: defaultdict[Tensor, dict] = defaultdict(dict)
    for parameter in held:
        name = names[parameter]
        kept = report.positions.get(name, {})
        if parameter in optimizer.state:
            state[theirs[name]] = _left(optimizer.state[parameter], parameter, kept, name)
    for group in optimizer.param_groups:
        group["params"] = [theirs[names[parameter]] for parameter in group["params"]]
    optimizer.state = state


def _left(
    state: Mapping[str, object], parameter: Tensor, kept: Mapping[int, np.ndarray], name: str
) -> dict[str, object]:
    left = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.ndim and kept:
            if value.shape != parameter.shape:
                raise ValueError(
                    f"the optimiser's {key!r} of {name!r} has shape {tuple(value.shape)}, not its "
                    "parameter's, and cannot be cut; make a new optimiser for the smaller model"
                )
            value = cut(value, kept)
        left[key] = value
    return left
