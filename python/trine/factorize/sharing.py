"""Layers that share their weights, as those of ALBERT do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from trine.compress.edits import settings
from trine.compress.layers import bytes_of, copy_model, require_module
from trine.compress.report import require_place_for_report
from trine.factorize.factorize import finished
from trine.factorize.report import LayerChange


def share_layers(
    model: nn.Module, layers: str, groups: int | Sequence[Sequence[int]] = 1
) -> nn.Module:
    """A copy of `model` in which layers of equal form hold the same weights (ALBERT).

    The weights of a group become their mean over the group, a start to train from: what the model
    computes changes. (ALBERT, arXiv:1909.11942, trains so from the beginning.) The model holds
    and stores them once; it takes as long as before. Layers stay apart where they must, by their
    number in a cache of keys and values for instance: shared are the modules inside them that hold
    weights, so that `trine.compress` and `trine.save` see one module under several names.

    Args:
        model: any module. It is not touched.
        layers: the name of the nn.ModuleList (or nn.Sequential) that holds the layers.
        groups: how many groups of consecutive layers to make (1: all layers share), or the numbers
            of the layers of each group; layers of no group stay as they are.

    Returns:
        The copy, with a `report` on each group.

    Raises:
        ValueError: there is no such list; groups that do not fit; layers of a group that are not
            of one form, share weights already or hold NaN.
    """
    require_module(model, "share_layers")
    require_place_for_report(model, "share_layers")
    stack = dict(model.named_modules()).get(layers)
    if not isinstance(stack, nn.ModuleList | nn.Sequential):
        raise ValueError(
            f"share_layers: {layers!r} is no nn.ModuleList or nn.Sequential of the model"
        )
    numbers = _groups(groups, len(stack))
    for group in numbers:
        _require_same_form([stack[i] for i in group], group)

    small = copy_model(model, {})
    copied, rows = small.get_submodule(layers), []
    for group in numbers:
        members = [copied[i] for i in group]
        before = sum(map(bytes_of, members))
        for modules in _alike(members):
            _share(modules)
        shared = nn.ModuleList(members)
        reason = f"layers {', '.join(map(str, group))} share their weights"
        rows.append(LayerChange(layers, True, reason, before, bytes_of(shared)))
    return finished(model, small, rows)


def _groups(groups: int | Sequence[Sequence[int]], count: int) -> list[list[int]]:
    if isinstance(groups, int):
        if not 1 <= groups <= count:
            raise ValueError(f"share_layers: {groups} groups of {count} layers cannot be made")
        bounds = [round(i * count / groups) for i in range(groups + 1)]
        made = [list(range(*bounds[i : i + 2])) for i in range(groups)]
        return [group for group in made if len(group) > 1]
    made = [list(group) for group in groups]
    members = [i for group in made for i in group]
    if len(set(members)) < len(members) or not set(members) <= set(range(count)):
        raise ValueError(
            f"share_layers: groups are {made}; each must name layers from 0 to {count - 1}, each "
            "at most once"
        )
    return [group for group in made if len(group) > 1]


def _form(layer: nn.Module) -> list[tuple]:
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    modules = [(name, type(module).__name__) for name, module in layer.named_modules()]
    return [*modules, *((name, tuple(t.shape), str(t.dtype)) for name, t in tensors)]


def _require_same_form(members: list[nn.Module], group: list[int]) -> None:
    first = _form(members[0])
    seen = {id(p) for p in members[0].parameters()}
    for number, layer in zip(group[1:], members[1:], strict=True):
        if _form(layer) != first:
            other = next(iter(set(map(str, _form(layer))) ^ set(map(str, first))), "order")
            raise ValueError(
                f"share_layers: layers {group[0]} and {number} are not of one form (one of them "
                f"has {other}); leave one out of the group"
            )
        if seen & {id(p) for p in layer.parameters()}:
            raise ValueError(f"share_layers: layer {number} shares weights with one before it")
        seen |= {id(p) for p in layer.parameters()}
    for number, layer in zip(group, members, strict=True):
        if not all(torch.isfinite(p).all() for p in layer.parameters()):
            raise ValueError(f"share_layers: the weights of layer {number} hold NaN or infinity")


def _alike(members: list[nn.Module]) -> Iterator[list[tuple[nn.Module, str, nn.Module]]]:
    """(parent, key, module) of the innermost modules of all members that stand in one place."""
    for key in list(members[0]._modules):
        children = [member._modules[key] for member in members]
        if children[0] is None:
            continue
        if children[0]._modules:
            yield from _alike(children)
        elif children[0]._parameters:
            yield list(zip(members, [key] * len(members), children, strict=True))
    if members[0]._parameters:
        yield [(None, "", member) for member in members]


def _share(places: list[tuple[nn.Module | None, str, nn.Module]]) -> None:
    """Give all places the first module, or its parameters where it cannot stand there."""
    first, modules = places[0][2], [module for _, _, module in places]
    for key, parameter in first._parameters.items():
        if parameter is None:
            continue
        mean = torch.stack([m._parameters[key].detach().double() for m in modules]).mean(0)
        parameter.data = mean.to(parameter.dtype)
        for module in modules[1:]:
            module._parameters[key] = parameter
    for parent, key, module in places[1:]:
        if parent is not None and settings(module) == settings(first) and not module._buffers:
            parent._modules[key] = first
