"""The parameters and buffers of a model: their places, and which places hold the same one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn


def tensors_of(
    model: nn.Module, replacements: Mapping[nn.Module, nn.Module] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every parameter and buffer by its first name, and the first names of the further ones.

    `replacements` maps modules of the model to others that count in their place.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, module, key in tensor_slots(model, replacements):
        tensor = module._parameters.get(key, module._buffers.get(key))
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor
    return tensors, aliases


def tensor_slots(
    model: nn.Module, replacements: Mapping[nn.Module, nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module, str]]:
    """Every place of a parameter or buffer: its name in the model, the module, its name there."""
    for prefix, found in model.named_modules(remove_duplicate=False):
        module = (replacements or {}).get(found, found)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{prefix}.{key}" if prefix else key, module, key
