"""Trees of known modules as plain data, and the trees built from it.

Building looks classes up in a fixed table and hands their constructors plain values.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import nn

from trine.compress.layers import float_layer
from trine.nn import (
    ClusteredEmbedding,
    ClusteredLinear,
    LowRankConv2d,
    LowRankEmbedding,
    LowRankLinear,
    PackedLayer,
    QuantizingLayerNorm,
    QuantizingRMSNorm,
    SeparateAttention,
)

Description = dict[str, Any]

_CONVOLUTION = (
    "in_channels out_channels kernel_size stride padding dilation groups bias padding_mode"
)
_BATCH_NORM = "num_features eps momentum affine track_running_stats"
_LAYER_NORM = "normalized_shape eps elementwise_affine bias"
_RMS_NORM = "normalized_shape eps elementwise_affine"

# Modules inside of each other, each under two names, have names without end.
_MOST_NAMES = 1_000_000

# The modules that can be rebuilt: each with its constructor's arguments, all kept as attributes.
MODULES: dict[type[nn.Module], str] = {
    nn.AdaptiveAvgPool1d: "output_size",
    nn.AdaptiveAvgPool2d: "output_size",
    nn.AvgPool2d: "kernel_size stride padding ceil_mode count_include_pad divisor_override",
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.Dropout: "p inplace",
    nn.Dropout2d: "p inplace",
    nn.ELU: "alpha inplace",
    nn.Embedding: "num_embeddings embedding_dim padding_idx max_norm norm_type scale_grad_by_freq",
    nn.Flatten: "start_dim end_dim",
    nn.GELU: "approximate",
    nn.GroupNorm: "num_groups num_channels eps affine",
    nn.Hardswish: "inplace",
    nn.Identity: "",
    nn.LayerNorm: _LAYER_NORM,
    nn.LeakyReLU: "negative_slope inplace",
    nn.Linear: "in_features out_features bias",
    nn.LogSoftmax: "dim",
    nn.MaxPool2d: "kernel_size stride padding dilation return_indices ceil_mode",
    nn.RMSNorm: _RMS_NORM,
    nn.ReLU: "inplace",
    nn.ReLU6: "inplace",
    nn.SiLU: "inplace",
    nn.Sigmoid: "",
    nn.Softmax: "dim",
    nn.Tanh: "",
    nn.Unflatten: "dim unflattened_size",
    LowRankEmbedding: "num_embeddings embedding_dim rank padding_idx",
    ClusteredEmbedding: "num_embeddings embedding_dim bits group padding_idx",
    ClusteredLinear: "in_features out_features bits group bias",
    LowRankLinear: "in_features out_features rank bias residual",
    QuantizingLayerNorm: _LAYER_NORM,
    QuantizingRMSNorm: _RMS_NORM,
    SeparateAttention: "embed_dim num_heads head_dim kdim vdim dropout bias batch_first",
}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, LowRankConv2d)
# Arguments that say whether there is what the attribute holds.
_OPTIONAL = {"bias", "residual"}
_CLASSES = {module.__name__: module for module in (*MODULES, *_CONTAINERS)}


def describe_tree(
    module: nn.Module | None, seen: MutableMapping[nn.Module, str], name: str
) -> Description | None:
    """The description of the module of that name, with float layers for packed ones, or None.

    `seen` holds the names of the modules met so far, for those that occur again.
    """
    if module in seen:
        return {"same_as": seen[module]}
    if isinstance(module, PackedLayer):
        kind, arguments = float_layer(module)
        description = {"class": kind, "arguments": arguments}
    elif type(module) in _CONTAINERS:
        children = {
            key: describe_tree(child, seen, f"{name}.{key}" if name else key)
            for key, child in module._modules.items()
        }
        if None in children.values():
            return None
        description = {"class": type(module).__name__, "children": children}
    elif type(module) in MODULES:
        arguments = {key: getattr(module, key) for key in MODULES[type(module)].split()}
        for key in arguments.keys() & _OPTIONAL:
            arguments[key] = arguments[key] is not None
        description = {"class": type(module).__name__, "arguments": arguments}
    else:
        return None
    seen[module] = name
    return description


def build_tree(
    description: Description, built: MutableMapping[str, nn.Module], name: str
) -> nn.Module:
    """The module described; `built` holds those built so far by their names."""
    if "same_as" in description:
        return built[description["same_as"]]
    module_class = _CLASSES[description["class"]]
    if module_class in _CONTAINERS:
        module = module_class()
        for key, child in description["children"].items():
            path = f"{name}.{key}" if name else key
            module.add_module(key, build_tree(child, built, path))
    else:
        # JSON knows no tuples, and some of the constructors take no lists.
        arguments = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in description["arguments"].items()
        }
        module = module_class(**arguments)
    built[name] = module
    return module


def refuse_explosion(model: nn.Module) -> None:
    """Raises ValueError where sharing gives the modules more names than anyone could list."""
    names: dict[nn.Module, int] = {}

    def count(module: nn.Module) -> int:
        if module not in names:
            names[module] = 1 + sum(count(c) for c in module._modules.values() if c is not None)
        return names[module]

    if count(model) > _MOST_NAMES:
        raise ValueError(f"the modules have more than {_MOST_NAMES} names together")
