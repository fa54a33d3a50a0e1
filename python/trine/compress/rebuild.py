"""A model's float structure as plain data, and the model built from it without running its code.

Two kinds of model can be described: trees of common torch.nn modules, and models of transformers
with their configuration. Building looks classes up in fixed places and hands them plain values.
"""

from __future__ import annotations

import json
import sys
from types import NoneType
from typing import Any

import torch
from torch import nn

from trine.compress.layers import is_linear, signature
from trine.nn import PackedLinear

Description = dict[str, Any]

_CONVOLUTION = (
    "in_channels out_channels kernel_size stride padding dilation groups bias padding_mode"
)
_BATCH_NORM = "num_features eps momentum affine track_running_stats"

# The modules that can be rebuilt: each with its constructor's arguments, all kept as attributes.
_MODULES: dict[type[nn.Module], str] = {
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
    nn.LayerNorm: "normalized_shape eps elementwise_affine bias",
    nn.LeakyReLU: "negative_slope inplace",
    nn.Linear: "in_features out_features bias",
    nn.LogSoftmax: "dim",
    nn.MaxPool2d: "kernel_size stride padding dilation return_indices ceil_mode",
    nn.RMSNorm: "normalized_shape eps elementwise_affine",
    nn.ReLU: "inplace",
    nn.ReLU6: "inplace",
    nn.SiLU: "inplace",
    nn.Sigmoid: "",
    nn.Softmax: "dim",
    nn.Tanh: "",
    nn.Unflatten: "dim unflattened_size",
}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_CLASSES = {module.__name__: module for module in (*_MODULES, *_CONTAINERS)}

# Attention of transformers' own; any other name could make it fetch and run a kernel's code.
_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
_FETCHING = ("auto_map", "kernel_config", "quantization_config", "use_pretrained_backbone")


def describe(model: nn.Module) -> Description | None:
    """The description of `model`, with float layers for packed ones; None where it has none.

    Only what building it gives the very same structure for has one.
    """
    description = _describe_transformers(model) or _describe_tree(model, {}, "")
    if description is None:
        return None
    try:
        twin = build(description, device="meta")  # takes neither memory nor random numbers
    except ValueError:
        return None  # it reads values while it is built, which the meta device does not have
    return description if _same_structure(model, twin) else None


def build(description: Description, device: str = "cpu") -> nn.Module:
    """The model described, with weights of no meaning; the caller's random state stays as it is.

    Raises ValueError for what `describe` would not have written.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            if "transformers" in description:
                return _build_transformers(description)
            return _build_tree(description, {}, "")
    except ValueError:
        raise
    except Exception as error:  # a constructor may raise anything for values not made for it
        raise ValueError(f"the description of the model is malformed ({error!r})") from error


def _same_structure(model: nn.Module, twin: nn.Module) -> bool:
    modules = list(model.named_modules(remove_duplicate=False))
    twins = list(twin.named_modules(remove_duplicate=False))
    return [name for name, _ in modules] == [name for name, _ in twins] and all(
        _same_module(module, other) for (_, module), (_, other) in zip(modules, twins, strict=True)
    )


def _same_module(module: nn.Module, twin: nn.Module) -> bool:
    if isinstance(module, PackedLinear):
        return is_linear(twin) and signature(module) == signature(twin)
    return (
        type(module) is type(twin)
        and "forward" not in vars(module)
        and _shapes(module) == _shapes(twin)
        and _settings(module) == _settings(twin)
    )


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    tensors = {**module._parameters, **module._buffers}
    return {name: tensor.shape for name, tensor in tensors.items() if tensor is not None}


def _settings(module: nn.Module) -> dict[str, Any]:
    """The public attributes of plain types, such as an eps that was changed after building."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str | tuple | NoneType)
        and not name.startswith("_")
        and name not in ("training", "name_or_path")
    }


# ---- trees of torch.nn modules ----


def _describe_tree(
    module: nn.Module | None, seen: dict[nn.Module, str], name: str
) -> Description | None:
    """`seen` holds the names of the modules met so far, for those that occur again."""
    if module in seen:
        return {"same_as": seen[module]}
    if isinstance(module, PackedLinear):
        in_features, out_features, bias = signature(module)
        arguments = {"in_features": in_features, "out_features": out_features, "bias": bias}
        description = {"class": "Linear", "arguments": arguments}
    elif type(module) in _CONTAINERS:
        children = {
            key: _describe_tree(child, seen, f"{name}.{key}" if name else key)
            for key, child in module._modules.items()
        }
        if None in children.values():
            return None
        description = {"class": type(module).__name__, "children": children}
    elif type(module) in _MODULES:
        arguments = {key: getattr(module, key) for key in _MODULES[type(module)].split()}
        if "bias" in arguments:
            arguments["bias"] = module.bias is not None
        description = {"class": type(module).__name__, "arguments": arguments}
    else:
        return None
    seen[module] = name
    return description


def _build_tree(description: Description, built: dict[str, nn.Module], name: str) -> nn.Module:
    if "same_as" in description:
        return built[description["same_as"]]
    module_class = _CLASSES[description["class"]]
    if module_class in _CONTAINERS:
        module = module_class()
        for key, child in description["children"].items():
            path = f"{name}.{key}" if name else key
            module.add_module(key, _build_tree(child, built, path))
    else:
        # JSON knows no tuples, and some of the constructors take no lists.
        arguments = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in description["arguments"].items()
        }
        module = module_class(**arguments)
    built[name] = module
    return module


# ---- models of transformers ----


def _describe_transformers(model: nn.Module) -> Description | None:
    # A model of the library has imported it; asking here spares everyone else the import.
    library = sys.modules.get("transformers")
    name = type(model).__name__
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None
    if getattr(library, name, None) is not type(model):
        return None
    attention = model.config._attn_implementation
    description = {"transformers": name, "config": _plain(model.config), "attention": attention}
    if attention is not None and attention not in _ATTENTION:
        return None
    if model.can_generate():
        description["generation"] = _plain(model.generation_config)
    return description


def _plain(config: Any) -> Any:
    return _harmless(json.loads(config.to_json_string(use_diff=False)))


def _harmless(config: Any) -> Any:
    """Without the keys that name private state, or code and weights to be fetched."""
    if isinstance(config, dict):
        return {
            key: _harmless(value)
            for key, value in config.items()
            if not key.startswith("_") and "implementation" not in key and key not in _FETCHING
        }
    return [_harmless(item) for item in config] if isinstance(config, list) else config


def _build_transformers(description: Description) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "the checkpoint holds a model of transformers; pip install transformers"
        ) from error
    model_class = getattr(transformers, description["transformers"], None)
    if not isinstance(model_class, type) or not issubclass(
        model_class, transformers.PreTrainedModel
    ):
        raise ValueError(f"transformers has no model class {description['transformers']!r}")
    config = model_class.config_class.from_dict(_harmless(description["config"]))
    if description["attention"] not in (None, *_ATTENTION):
        raise ValueError(f"unknown attention implementation {description['attention']!r}")
    config._attn_implementation = description["attention"]
    model = model_class(config)
    if "generation" in description:
        generation = _harmless(description["generation"])
        model.generation_config = transformers.GenerationConfig.from_dict(generation)
    return model
