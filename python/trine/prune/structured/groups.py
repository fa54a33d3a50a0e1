"""Groups of coupled slices of parameters: what tracing found and removing takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from trine.compress.layers import is_linear
from trine.nn.packed import is_conv1d
from trine.prune.structured.labels import Label
from trine.prune.structured.units import Units

KINDS = ("neuron", "channel", "head", "hidden")
_CONVOLUTIONS = nn.modules.conv._ConvNd


@dataclass(frozen=True, eq=False)
class Slice:
    """One dimension of one parameter or buffer: `unit[i]` is what its position i belongs to.

    A position of another group, or of none, has -1.
    """

    parameter: str
    dim: int
    unit: np.ndarray


@dataclass(frozen=True, eq=False)
class Group:
    """`size` units that do the same, such as the neurons of one layer; each is removed whole.

    `layers` are those that make them, `name` is the first of these. `width` is how many of its
    outputs one unit has, `weights` how many weights of the model. `kind` is one of KINDS: a
    "hidden" unit goes through a norm, whose statistics change where it goes.
    """

    name: str
    kind: str
    size: int
    width: int
    weights: int
    layers: tuple[str, ...]
    slices: tuple[Slice, ...]


class Groups(Mapping[str, Group]):
    """The groups by name; `frozen` says of other layers' outputs why they stay.

    `without_rule` names the operators that no rule covers, each with a module that calls it.
    """

    def __init__(
        self, groups: list[Group], frozen: Mapping[str, str], without_rule: Mapping[str, str]
    ) -> None:
        self._groups = {group.name: group for group in groups}
        self.frozen = dict(frozen)
        self.without_rule = dict(without_rule)

    def __getitem__(self, name: str) -> Group:
        return self._groups[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __str__(self) -> str:
        lines = [
            f"{group.name}: {group.size} x {group.kind}"
            + (f" of {group.width}" if group.width > 1 else "")
            + f", in {len(group.slices)} slices"
            for group in self.values()
        ]
        lines += [f"{name}: kept, {reason}" for name, reason in self.frozen.items()]
        lines += [
            f"{operator} (in {place or 'the model'}) has no rule"
            for operator, place in self.without_rule.items()
        ]
        return "\n".join(lines)


def leaves_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and float buffers, each once, by its first name."""
    yield from model.named_parameters()
    yield from ((name, b) for name, b in model.named_buffers() if b.is_floating_point())


def output_dim(module: nn.Module, parameter: str) -> int | None:
    """The dimension of a layer's weight along which its outputs lie; None for anything else."""
    if parameter != "weight":
        return None
    if is_conv1d(module) or isinstance(module, nn.Embedding):
        return 1
    if isinstance(module, _CONVOLUTIONS):
        return 1 if module.transposed else 0
    return 0 if is_linear(module) else None


def make_groups(
    model: nn.Module,
    labels: Mapping[str, Label],
    units: Units,
    without_rule: Mapping[str, str],
) -> Groups:
    """Gather the units of all parameters into groups, in the order of the model's parameters."""
    frozen = units.reasons()
    places = [
        (name, block.dims[0], units.roots(block.ids))
        for name, label in labels.items()
        for block in label.blocks
    ]
    met: dict[int, list[int]] = {}
    for number, (_, _, roots) in enumerate(places):
        for root in np.unique(roots).tolist():
            if root not in frozen:
                met.setdefault(root, []).append(number)
    alike: dict[tuple[int, ...], list[int]] = {}
    for root, numbers in met.items():
        alike.setdefault(tuple(numbers), []).append(root)

    makers = _outputs(model)
    groups: list[Group] = []
    taken: dict[str, int] = {}
    for numbers, roots in sorted(alike.items()):
        number_of = {root: i for i, root in enumerate(roots)}
        slices = tuple(
            Slice(name, dim, np.array([number_of.get(r, -1) for r in owners.tolist()]))
            for name, dim, owners in (places[i] for i in numbers)
        )
        made = [part for part in slices if (part.parameter, part.dim) in makers]
        first = made[0] if made else slices[0]
        layers = tuple(makers[part.parameter, part.dim] for part in made) or (first.parameter,)
        name = layers[0]
        taken[name] = taken.get(name, 0) + 1
        if taken[name] > 1:
            name = f"{name}#{taken[name]}"
        width = int((first.unit >= 0).sum()) // len(roots)
        kind = _kind(model, slices, units, roots)
        weights = sum(
            labels[p.parameter].size // len(p.unit) * int((p.unit >= 0).sum()) for p in slices
        )
        groups.append(Group(name, kind, len(roots), width, weights // len(roots), layers, slices))
    reasons = {}
    for name, dim, roots in places:
        kept = [frozen[root] for root in roots.tolist() if root in frozen]
        if kept and (name, dim) in makers:
            part = "" if len(kept) == len(roots) else "in part: "
            reasons[makers[name, dim]] = part + kept[0]
    return Groups(groups, reasons, without_rule)


def _outputs(model: nn.Module) -> dict[tuple[str, int], str]:
    """The layers by their weights and the dimensions along which their outputs lie."""
    found = {}
    for name, _ in model.named_parameters():
        owner, _, key = name.rpartition(".")
        dim = output_dim(model.get_submodule(owner), key)
        if dim is not None:
            found[name, dim] = owner
    return found


def _kind(model: nn.Module, slices: tuple[Slice, ...], units: Units, roots: list[int]) -> str:
    if units.tagged("statistic") & set(roots):
        return "hidden"
    if units.tagged("head") & set(roots):
        return "head"
    owners = {part.parameter.rpartition(".")[0] for part in slices}
    convolved = any(isinstance(model.get_submodule(owner), _CONVOLUTIONS) for owner in owners)
    return "channel" if convolved else "neuron"
