"""Make a smaller copy of a model, without chosen units, and prove that it computes the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trine.calibration.probe import module_names, probing, run, tensors_in
from trine.compress.layers import copy_model
from trine.prune.structured.groups import Group, Groups, leaves_of
from trine.prune.structured.sizes import adjust_layers, adjust_owners, candidates

Chosen = Mapping[str, np.ndarray]  # numbers of the units to be removed, by group

# How far the outputs may be from those of the model with the same units at zero: the sums are the
# same but for terms that are zero, in another order. Relative to the largest output.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def without(model: nn.Module, groups: Groups, chosen: Chosen, batches: list[Any]) -> nn.Module:
    """A copy of `model` without the chosen units of each group; it is run on the batches.

    Unless hidden units are among them, whose norms see other statistics, its outputs are compared
    with those of the model whose removed slices are zero.

    Raises:
        ValueError: the smaller model cannot run or computes something else, since the model's own
            code relies on sizes that nothing here knows of; the message names the module.
    """
    chosen = {name: units for name, units in chosen.items() if len(units)}
    small = copy_model(model, {})
    if not chosen:
        return small
    shapes = {name: tuple(tensor.shape) for name, tensor in leaves_of(model)}
    _cut_all(small, groups, chosen)
    adjust_layers(small, shapes)
    adjust_owners(small, groups, chosen, shapes)
    outputs = _run_adjusting(small, candidates(small, groups, chosen, shapes), batches)
    if not any(groups[name].kind == "hidden" for name in chosen):
        _compare(model, groups, chosen, batches, outputs)
    return small


def parts(group: Group, units: np.ndarray) -> list[tuple[str, int, np.ndarray]]:
    """Of every slice of the group: parameter, dimension and which positions these units have."""
    return [(part.parameter, part.dim, np.isin(part.unit, units)) for part in group.slices]


def kept_positions(groups: Groups, chosen: Chosen) -> dict[str, dict[int, np.ndarray]]:
    """Of every parameter that shrinks the positions that are left, by dimension."""
    gone: dict[str, dict[int, np.ndarray]] = {}
    for name, units in chosen.items():
        for parameter, dim, mine in parts(groups[name], units):
            found = gone.setdefault(parameter, {})
            found[dim] = found.get(dim, False) | mine
    return {
        parameter: {dim: np.flatnonzero(~mine) for dim, mine in found.items() if mine.any()}
        for parameter, found in gone.items()
    }


def cut(tensor: Tensor, kept: Mapping[int, np.ndarray]) -> Tensor:
    """The positions that are left of each dimension."""
    for dim, positions in kept.items():
        tensor = tensor.index_select(dim, torch.from_numpy(positions).to(tensor.device))
    return tensor


def _cut_all(small: nn.Module, groups: Groups, chosen: Chosen) -> None:
    tensors = dict(leaves_of(small))
    for name, kept in kept_positions(groups, chosen).items():
        tensors[name].data = cut(tensors[name].data, kept)  # in place: whatever is tied stays so
        tensors[name].grad = None


def _run_adjusting(
    small: nn.Module, sizes: Mapping[str, dict[str, Any]], batches: list[Any]
) -> list[Tensor]:
    """The outputs; where a module fails, its own numbers are brought in line with its layers'.

    `sizes` holds the numbers that may be set in each module (see `candidates`): all are tried
    together, then each alone, until that module does not fail.
    """
    tries: dict[str, list[dict[str, Any]]] = {}
    before: dict[str, dict[str, Any]] = {}
    while True:
        with probing(small) as probe, module_names(probe) as running:
            try:
                return [x for batch in batches for x in tensors_in(run(probe, batch))]
            except Exception as error:  # whatever the model's own code raises for wrong sizes
                name, failure = running[-1], error
        found = sizes.get(name, {})
        own = vars(small.get_submodule(name))
        if name not in tries:
            before[name] = {key: own[key] for key in found}
            alone = [{key: value} for key, value in found.items()] if len(found) > 1 else []
            tries[name] = [found, *alone] if found else []
        if not tries[name]:
            raise ValueError(
                f"the model without these units cannot run: {name or type(small).__name__!r} "
                f"raises {type(failure).__name__} ({_first_line(failure)}); its "
                "code relies on sizes that pruning does not know; leave its layers out (keep=)"
            ) from failure
        own.update(before[name] | tries[name].pop(0))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "without a message").splitlines()[0]


def _compare(
    model: nn.Module,
    groups: Groups,
    chosen: Chosen,
    batches: list[Any],
    outputs: Sequence[Tensor],
) -> None:
    """Raises ValueError where the outputs are not those of the model with zeros in its place."""
    if not same_outputs(outputs, zeroed_outputs(model, groups, chosen, batches)):
        raise ValueError(
            "the model without these units does not compute what it computes with them at "
            f"zero; groups: {', '.join(chosen)}. Its code relies on sizes or positions that "
            "pruning does not know; leave these layers as they are (keep=)"
        )


def same_outputs(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether they differ by no more than the rounding of sums in another order."""
    if [x.shape for x in ours] != [x.shape for x in theirs]:
        return False
    for one, other in zip(ours, theirs, strict=True):
        if other.is_floating_point() and other.numel():
            scale = float(other.detach().abs().nan_to_num(0, 0, 0).max())
            tolerance = _TOLERANCE.get(other.dtype, 5e-2) * scale
            if not torch.allclose(one, other, rtol=0, atol=tolerance, equal_nan=True):
                return False
    return True


def zeroed_outputs(
    model: nn.Module, groups: Groups, chosen: Chosen, batches: list[Any]
) -> list[Tensor]:
    """What the whole model returns on the batches with the chosen units' parameters at zero."""
    touched = {part.parameter for name in chosen for part in groups[name].slices}
    untouched = (p for name, p in model.named_parameters() if name not in touched)
    zeroed = copy_model(model, {parameter: parameter for parameter in untouched})
    parameters = dict(zeroed.named_parameters())
    with torch.no_grad():
        for name, units in chosen.items():
            for parameter, dim, mine in parts(groups[name], units):
                if parameter in parameters:
                    places = torch.from_numpy(np.flatnonzero(mine))
                    tensor = parameters[parameter]
                    tensor.index_fill_(dim, places.to(tensor.device), 0)
    with probing(zeroed) as probe:
        return [x for batch in batches for x in tensors_in(run(probe, batch))]
