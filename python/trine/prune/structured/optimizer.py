"""An optimiser that goes on with the smaller model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from trine.nn.separate_attention import SeparateAttention, origins, third_of
from trine.prune.structured.remove import cut
from trine.prune.structured.report import RemovalReport


def hand_over(optimizer: torch.optim.Optimizer, model: nn.Module, small: nn.Module) -> None:
    """Let `optimizer`, which trained `model`, train `small` with the state of what is left.

    In place, so that schedules of the learning rate go on. The projections of an
    nn.MultiheadAttention that was separated go on with their thirds of its state. Under DDP wrap
    `small` anew; every process has to remove the same.

    Args:
        small: what `prune_structured` or `remove` made of `model`.

    Raises:
        ValueError: `small` is of another model; a parameter that `model` does not have; a state
            that does not have its parameter's shape (as Adafactor's has not). The optimiser is then
            as it was.
    """
    report = getattr(small, "removal_report", None)
    ours, theirs = dict(model.named_parameters()), dict(small.named_parameters())
    made = _made_of(model, small, theirs)
    if not isinstance(report, RemovalReport) or ours.keys() != made.keys():
        raise ValueError("hand_over takes a model and what prune_structured or remove made of it")
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's holds the real one
    names = {parameter: name for name, parameter in ours.items()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(parameter not in names for parameter in held):
        raise ValueError("the optimiser trains parameters that are not the model's")
    state: defaultdict[Tensor, dict] = defaultdict(dict)
    for parameter in held:
        for name, third in made[names[parameter]]:
            kept = report.positions.get(name, {})
            if parameter in optimizer.state:
                old = optimizer.state[parameter]
                state[theirs[name]] = _left(old, parameter, third, kept, names[parameter])
    for group in optimizer.param_groups:
        held = [names[parameter] for parameter in group["params"]]
        new = [name for old in held for name, _ in made[old]]
        group["params"] = [theirs[name] for name in new]
        if "param_names" in group:  # the optimiser was given names
            group["param_names"] = new
    optimizer.state = state


def _made_of(
    model: nn.Module, small: nn.Module, names: Iterable[str]
) -> dict[str, list[tuple[str, int | None]]]:
    """For each of the model's parameters those made of it: of which third of it, or of all."""
    sources: dict[str, tuple[str, int | None]] = {name: (name, None) for name in names}
    modules = dict(model.named_modules())
    for path, module in small.named_modules():
        if isinstance(module, SeparateAttention) and isinstance(
            modules.get(path), nn.MultiheadAttention
        ):
            prefix = f"{path}." if path else ""
            for name, (whole, third) in origins(modules[path]).items():
                sources[prefix + name] = prefix + whole, third
    made: dict[str, list[tuple[str, int | None]]] = {}
    for name, (whole, third) in sources.items():
        made.setdefault(whole, []).append((name, third))
    return made


def _left(
    state: Mapping[str, object],
    parameter: Tensor,
    third: int | None,
    kept: Mapping[int, np.ndarray],
    name: str,
) -> dict[str, object]:
    left = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and not value.ndim and third is not None:
            value = value.clone()  # a count of steps, which each of the three goes on with
        elif isinstance(value, Tensor) and value.ndim and (kept or third is not None):
            if value.shape != parameter.shape:
                raise ValueError(
                    f"the optimiser's {key!r} of {name!r} has shape {tuple(value.shape)}, not its "
                    "parameter's, and cannot be cut; make a new optimiser for the smaller model"
                )
            value = cut(third_of(value, third), kept)
        left[key] = value
    return left
