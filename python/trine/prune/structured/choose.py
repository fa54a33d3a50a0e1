"""Which units go: those of the lowest scores, of each group or of all together."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from torch import Tensor, nn

from trine.prune.criteria import Criterion
from trine.prune.structured.groups import KINDS, Group, Groups, output_dim

Importance = Criterion | Callable[[nn.Module, Mapping[str, nn.Module]], Mapping[str, Tensor]]
Choice = dict[str, np.ndarray]


def unit_scores(
    model: nn.Module, groups: Groups, names: Iterable[str], importance: Importance
) -> dict[str, np.ndarray]:
    """For each unit of these groups the mean score of the weights that go with it."""
    slices = {name: _scored(model, groups[name]) for name in names}
    for name, found in slices.items():
        if not found:
            raise ValueError(
                f"no weight of a linear or convolutional layer tells what the units of {name!r} "
                "are worth; leave it out (keep=)"
            )
    wanted = {layer for found in slices.values() for layer, _, _ in found}
    layers = {name: module for name, module in model.named_modules() if name in wanted}
    score = importance.scores if isinstance(importance, Criterion) else importance
    scores = score(model, layers)
    for name, layer in layers.items():
        if name not in scores or scores[name].shape != layer.weight.shape:
            raise ValueError(f"the importance gives no score for each weight of layer {name!r}")
        if scores[name].isnan().any():
            raise ValueError(f"the scores of layer {name!r} hold NaN; are its weights finite?")
    values = {}
    for name, found in slices.items():
        total, count = np.zeros(groups[name].size), np.zeros(groups[name].size)
        for layer, dim, unit in found:
            tensor = scores[layer].detach().double().movedim(dim, 0).flatten(1)
            mine = unit >= 0
            np.add.at(total, unit[mine], tensor.sum(1).cpu().numpy()[mine])
            np.add.at(count, unit[mine], tensor.shape[1])
        values[name] = total / count
    return values


def _scored(model: nn.Module, group: Group) -> list[tuple[str, int, np.ndarray]]:
    """The slices that are of weights of linear and convolutional layers."""
    found = []
    for part in group.slices:
        owner, _, key = part.parameter.rpartition(".")
        module = model.get_submodule(owner)
        if output_dim(module, key) is not None and not isinstance(module, nn.Embedding):
            found.append((owner, part.dim, part.unit))
    return found


def checked(ratio: object, kinds: Iterable[str], scope: str, multiple_of: int) -> set[str]:
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    if not kinds or kinds - set(KINDS):
        raise ValueError(f"kinds are some of {', '.join(KINDS)}; got {sorted(kinds)}")
    if scope not in ("layer", "global"):
        raise ValueError(f"scope is 'layer' or 'global'; got {scope!r}")
    if type(multiple_of) is not int or multiple_of < 1:
        raise ValueError(f"multiple_of is a whole number from 1 on; got {multiple_of!r}")
    values = ratio.values() if isinstance(ratio, Mapping) else [ratio]
    for value in values:
        if not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(f"ratio is a share in [0, 1); got {value!r}")
    if isinstance(ratio, Mapping) and scope == "global":
        raise ValueError(
            "a ratio for each layer goes with scope='layer'; 'global' takes one number"
        )
    return kinds


def ratios_of(
    groups: Groups, ratio: float | Mapping[str, float], kinds: set[str], keep: tuple[str, ...]
) -> dict[str, float]:
    """The groups that may lose units, each with its ratio."""
    by_pattern = dict(ratio) if isinstance(ratio, Mapping) else {"*": ratio}
    layers = {layer for group in groups.values() for layer in group.layers} | set(groups.frozen)
    for pattern in (*keep, *by_pattern):
        if not fnmatch.filter(layers, pattern):
            raise ValueError(f"no layer that could lose outputs is named {pattern!r}")
    ratios = {}
    for name, group in groups.items():
        if group.kind not in kinds or any(fnmatch.filter(group.layers, p) for p in keep):
            continue
        given = next((r for p, r in by_pattern.items() if fnmatch.filter(group.layers, p)), None)
        if given is not None and group.size > 1:
            ratios[name] = given
    if not ratios:
        raise ValueError(
            f"nothing of the kinds {', '.join(sorted(kinds))} can be removed; "
            "print(trine.prune.trace(model, example_inputs)) says why"
        )
    return ratios


def _kept(group: Group, wanted: float, multiple_of: int) -> int:
    """How many units stay: at least as many as wanted, their outputs a multiple."""
    step = multiple_of // math.gcd(multiple_of, group.width)
    return min(group.size, max(1, math.ceil(wanted / step - 1e-9)) * step)


def choose(
    groups: Groups,
    ratios: Mapping[str, float],
    values: Choice,
    scope: str,
    multiple_of: int,
) -> Choice:
    """The numbers of the units that go, by group: the worst of each group or of all."""
    gone = (_of_each if scope == "layer" else _of_all)(groups, ratios, values)
    chosen = {}
    for name, count in gone.items():
        group = groups[name]
        kept = _kept(group, group.size - count, multiple_of) if count else group.size
        chosen[name] = np.argsort(values[name], kind="stable")[: group.size - kept]
    return chosen


def _of_each(groups: Groups, ratios: Mapping[str, float], values: Choice) -> dict[str, float]:
    return {name: groups[name].size * ratio for name, ratio in ratios.items()}


def _of_all(groups: Groups, ratios: Mapping[str, float], values: Choice) -> dict[str, float]:
    """Until the worst of all units hold the ratio of their weights."""
    names = list(ratios)
    budget = ratios[names[0]] * sum(groups[name].weights * groups[name].size for name in names)
    gone = dict.fromkeys(names, 0)
    order = sorted((value, name) for name in names for value in values[name].tolist())
    for _, name in order:
        if budget < groups[name].weights:
            break
        if gone[name] < groups[name].size - 1:
            gone[name] += 1
            budget -= groups[name].weights
    return gone
