"""The layers of a model whose weights can be pruned."""

from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trine.nn.packed import is_conv1d

__all__ = ["by_row", "check_finite", "prunable_layers", "wide"]

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def prunable_layers(
    model: nn.Module, layers: str | Iterable[str] = "*", skip: str | Iterable[str] = ()
) -> dict[str, nn.Module]:
    """The chosen linear and convolutional layers by their names in the model.

    Args:
        model: any module. nn.Linear, nn.Conv1d to nn.Conv3d and transformers' Conv1D have weights
            that can be pruned.
        layers, skip: patterns of fnmatch for whole names, case-sensitive: one or several. A layer
            that any of `layers` and none of `skip` matches is chosen.

    Raises:
        ValueError: a pattern of `layers` matches no such layer, or a chosen one cannot be pruned:
            its weight is shared with another module, computed, sharded, empty or not of floats.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"pruning takes a torch.nn.Module; got {type(model).__name__}")
    wanted, unwanted = _patterns(layers), _patterns(skip)
    known = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _KINDS) or is_conv1d(layer)
    }
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(
                f"no layer whose weights can be pruned is named '{pattern}'; there are: "
                + (", ".join(known) or "none")
            )
    chosen = {
        name: layer
        for name, layer in known.items()
        if any(fnmatchcase(name, p) for p in wanted)
        and not any(fnmatchcase(name, p) for p in unwanted)
    }
    if not chosen:
        raise ValueError("no layer is left to prune; check the patterns of layers and skip")
    users = Counter(
        id(parameter) for module in model.modules() for parameter in module._parameters.values()
    )
    for name, layer in chosen.items():
        if reason := _obstacle(layer, users):
            raise ValueError(
                f"layer '{name}' cannot be pruned: {reason}; leave it out with skip='{name}'"
            )
    return chosen


def check_finite(name: str, layer: nn.Module) -> None:
    """Raises ValueError where the weight of the layer of that name holds NaN or infinity."""
    if not torch.isfinite(layer.weight.detach()).all():
        raise ValueError(
            f"layer '{name}' cannot be pruned: its weight holds NaN or infinity; repair it, or "
            f"leave the layer out with skip='{name}'"
        )


def by_row(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A view of a tensor of the weight's shape as [N, K]: a row for each output of the layer."""
    return tensor.T if is_conv1d(layer) else tensor.flatten(1)


def wide(tensor: Tensor) -> Tensor:
    """Detached, with at least 32 bits: squares of small numbers vanish in 16."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _obstacle(layer: nn.Module, users: Counter[int]) -> str | None:
    if parametrize.is_parametrized(layer):
        return "it has parametrizations"
    weight = layer._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided:
        return "its weight is not a plain parameter"
    if not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if weight.numel() == 0:
        return "its weight is empty"
    if users[id(weight)] > 1:
        return "its weight is shared with another module"
    return None
