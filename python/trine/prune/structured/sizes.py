"""Sizes that modules keep as numbers beside their parameters, brought in line with these."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import nn

from trine.nn.packed import is_conv1d
from trine.prune.structured.groups import Groups, leaves_of

# What attention layers call the number of their heads, and what they call the width of all of them.
HEAD_COUNTS = (
    "num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads",
    "num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "num_query_heads",
)  # fmt: skip
HEAD_WIDTHS = ("all_head_size", "inner_dim", "split_size")


def adjust_layers(model: nn.Module, before: Mapping[str, tuple[int, ...]]) -> None:
    """Set the sizes that torch's and transformers' layers keep, from the shapes of their tensors.

    `before` holds the shapes of the parameters as they were, by name.
    """
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif is_conv1d(module):
            module.nx, module.nf = weight.shape
        elif isinstance(module, nn.Embedding):
            module.embedding_dim = weight.shape[1]
        elif isinstance(module, nn.modules.conv._ConvNd):
            _adjust_convolution(module, before.get(f"{name}.weight", weight.shape))
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            module.num_features = weight.shape[0]
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.normalized_shape = tuple(weight.shape)
        elif isinstance(module, nn.GroupNorm):
            width = module.num_channels // module.num_groups
            module.num_channels = weight.shape[0]
            module.num_groups = module.num_channels // width


def _adjust_convolution(module: nn.modules.conv._ConvNd, before: tuple[int, ...]) -> None:
    outputs, inputs = module.weight.shape[:2]
    if module.transposed:
        outputs, inputs = inputs, outputs
    elif module.groups > 1:  # whole groups went, and the channels inside of one stay
        module.groups = module.groups * outputs // before[0]
    module.out_channels, module.in_channels = outputs, inputs * module.groups


def adjust_owners(
    model: nn.Module,
    groups: Groups,
    chosen: Mapping[str, np.ndarray],
    before: Mapping[str, tuple[int, ...]],
) -> None:
    """Set the numbers of heads, and their widths, of the modules that hold layers with heads.

    They shrink as the layers' dimensions did.
    """
    tensors = dict(leaves_of(model))
    shrunk: dict[str, tuple[int, int]] = {}
    for name in chosen:
        for part in groups[name].slices if groups[name].kind == "head" else ():
            owner = part.parameter.rpartition(".")[0].rpartition(".")[0]
            now = tensors[part.parameter].shape[part.dim]
            shrunk[owner] = before[part.parameter][part.dim], now
    for owner, (old, new) in shrunk.items():
        own = vars(model.get_submodule(owner))
        for key in (*HEAD_COUNTS, *HEAD_WIDTHS):
            value = own.get(key)
            if type(value) is int and value * new % old == 0:
                own[key] = value * new // old


def candidates(
    model: nn.Module,
    groups: Groups,
    chosen: Mapping[str, np.ndarray],
    before: Mapping[str, tuple[int, ...]],
) -> dict[str, dict[str, int]]:
    """Numbers of modules that their forward may rely on, with what they would have to be now.

    By module: attributes that equal a size that its own or its layers' parameters had before, or
    how many units these had, where that size shrank. Those that could stand for two are left out.
    """
    changes: dict[str, dict[int, set[int]]] = {}

    def note(parameter: str, old: int, new: int) -> None:
        layer = parameter.rpartition(".")[0]
        for name in {layer, layer.rpartition(".")[0]}:
            changes.setdefault(name, {}).setdefault(old, set()).add(new)

    for name, tensor in leaves_of(model):
        for old, new in zip(before[name], tensor.shape, strict=True):
            if old != new:
                note(name, old, new)
    for name, units in chosen.items():
        for part in groups[name].slices:
            note(part.parameter, groups[name].size, groups[name].size - len(units))
    found: dict[str, dict[str, int]] = {}
    for name, sizes in changes.items():
        for key, value in vars(model.get_submodule(name)).items():
            new = sizes.get(value, set()) if type(value) is int else set()
            if len(new) == 1 and not key.startswith("_"):
                found.setdefault(name, {})[key] = min(new)
    return found
