"""The layers of a model that a technique is for: those chosen, and those that must stay."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from trine.compress.layers import obstacles_of, require_module
from trine.compress.report import require_place_for_report
from trine.nn.packed import is_conv1d


def choose_layers(
    model: nn.Module,
    kinds: tuple[type[nn.Module], ...],
    layers: str | Iterable[str],
    skip: str | Iterable[str],
    caller: str,
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers of those kinds that patterns choose, and the reasons why some of them must stay.

    Args:
        kinds: classes of torch.nn; with nn.Linear goes transformers' Conv1D.
        layers, skip: patterns of fnmatch for whole names, case-sensitive, one or several: what any
            of `layers` and none of `skip` matches is chosen.

    Raises ValueError where nothing is chosen or nothing may change, where a layer is named (not
    matched by a wildcard) that must stay, for NaN or infinity in a weight, and for layers on meta.
    """
    require_module(model, caller)
    require_place_for_report(model, caller)
    if hasattr(model, "_orig_mod"):
        raise ValueError(f"{caller} changes the model first; call torch.compile on the result")
    wanted, unwanted = _patterns(layers), _patterns(skip)
    known = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) or (nn.Linear in kinds and is_conv1d(module))
    }
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(
                f"{caller}: no layer of the kind that it is for is named {pattern!r}; there are: "
                + (", ".join(map(repr, known)) or "none")
            )
    chosen = {
        name: layer
        for name, layer in known.items()
        if any(fnmatchcase(name, p) for p in wanted)
        and not any(fnmatchcase(name, p) for p in unwanted)
    }
    stay = obstacles_of(model, chosen)
    for name, layer in chosen.items():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            stay.setdefault(name, f"it has {layer.groups} groups")
        if name in stay and name in wanted:
            raise ValueError(f"{caller}: layer {name!r} cannot be changed: {stay[name]}")
    free = [name for name in chosen if name not in stay]
    if not free:
        reasons = "; ".join(f"{name!r}: {reason}" for name, reason in stay.items())
        raise ValueError(f"{caller}: no layer is left that can be changed ({reasons or 'none'})")
    for name in free:
        require_values(name, chosen[name], caller)
    return chosen, stay


def require_values(name: str, layer: nn.Module, caller: str) -> None:
    if layer.weight.is_meta:
        raise ValueError(f"{caller}: layer {name!r} is on the meta device; load it first")
    if not torch.isfinite(layer.weight.detach()).all():
        raise ValueError(
            f"{caller}: the weight of layer {name!r} holds NaN or infinity; repair it, or leave it "
            f"out with skip={name!r}"
        )


def _patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
