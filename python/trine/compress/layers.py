"""The linear layers of a model: which there are, which may be replaced, and the copy that does."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trine.nn import Int8Conv2d, Int8Embedding, PackedLayer, PackedLinear
from trine.nn.int8_conv import padding_in_pixels
from trine.nn.packed import FLOAT_DTYPES, is_conv1d

# All that `register_*_hook` writes, which a replacement takes over.
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)


def require_module(model: object, caller: str) -> None:
    """Raises ValueError where `model` is none."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"{caller} takes a torch.nn.Module; got {type(model).__name__}")


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every nn.Linear and every Conv1D of transformers once, by its first name in the model."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or is_conv1d(module)
    }


def is_linear(module: nn.Module) -> bool:
    """Whether it is nn.Linear, the Conv1D of transformers, or a packed layer."""
    return isinstance(module, nn.Linear | PackedLinear) or is_conv1d(module)


def float_layer(module: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """The class of torch.nn that a layer is of, or stands for, and the constructor's arguments.

    For the layers that have a `PackedLayer`, and those; None for others. Where two have the same,
    one can take the place of the other.
    """
    if isinstance(module, nn.Embedding | Int8Embedding):
        names = ("num_embeddings", "embedding_dim", "padding_idx")
        return "Embedding", {name: getattr(module, name) for name in names}
    if isinstance(module, nn.Conv2d | Int8Conv2d):
        names = ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups")
        try:
            padding = (
                module.padding if isinstance(module, Int8Conv2d) else padding_in_pixels(module)
            )
        except ValueError:
            return None  # it has no packed form
        arguments = {name: getattr(module, name) for name in names}
        return "Conv2d", {**arguments, "padding": padding, "bias": module.bias is not None}
    if not is_linear(module):
        return None
    k, n = module.weight.shape if is_conv1d(module) else (module.in_features, module.out_features)
    return "Linear", {"in_features": k, "out_features": n, "bias": module.bias is not None}


def signature(layer: nn.Module) -> tuple[int, int, bool]:
    """K, N and whether there is a bias, of a layer for which `is_linear` holds."""
    return tuple(float_layer(layer)[1].values())


def stands_for(packed: PackedLayer, module: nn.Module) -> bool:
    """Whether the packed layer can take the place of `module`, a float or a packed one."""
    return float_layer(packed) == float_layer(module)


def bytes_of(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def obstacles(model: nn.Module) -> dict[str, str]:
    """The layers that must stay as they are, by name, each with the reason."""
    return obstacles_of(model, linear_layers(model))


def obstacles_of(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    known: tuple[type[nn.Module], ...] = (),
    *,
    together: bool = False,
) -> dict[str, str]:
    """Those of `layers` that must stay as they are, by name, each with the reason.

    They may be of any class of torch.nn with a weight and perhaps a bias, or Conv1D, or one of the
    `known` classes. With `together` all of them share one weight, which then is no reason, and are
    packed at once; a bias may be shared, for packing copies it.
    """
    users = Counter(
        _memory(tensor)
        for module in model.modules()
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    )
    if together:
        tied = {_memory(layer.weight): len(layers) for layer in layers.values()}
        shared = {memory for memory, count in users.items() if count > tied.get(memory, count)}
    else:
        shared = {memory for memory, count in users.items() if count > 1}
    found = {name: _obstacle(layer, shared, known) for name, layer in layers.items()}
    return {name: reason for name, reason in found.items() if reason}


def _obstacle(layer: nn.Module, shared: set[int], known: tuple[type[nn.Module], ...]) -> str | None:
    if parametrize.is_parametrized(layer):
        return "it has parametrizations"
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight; trine.prune.separate_attention helps"
    if _has_own_forward(layer, known):
        return f"{type(layer).__name__} has a forward of its own"
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided:
        return "its weight is not a plain parameter"
    if weight.dtype not in FLOAT_DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if weight.numel() == 0:
        return "its weight is empty"
    if any(t is not None and _memory(t) in shared for t in (weight, bias)):
        return "its weight or bias is shared with another module"
    if layer._modules or (layer._parameters.keys() | layer._buffers.keys()) - {"weight", "bias"}:
        return "it holds more than weight and bias"
    return None


def _has_own_forward(layer: nn.Module, known: tuple[type[nn.Module], ...]) -> bool:
    library_class = next(
        c
        for c in type(layer).__mro__
        if c.__module__.startswith("torch.nn.modules.") or c.__name__ == "Conv1D" or c in known
    )
    return "forward" in vars(layer) or any(
        getattr(type(layer), name) is not getattr(library_class, name)
        for name in ("forward", "__call__")
    )


def _memory(tensor: Tensor) -> int:
    """Equal for tensors that share memory, different for all others."""
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    has_memory = is_plain and tensor.device.type != "meta"
    address = tensor.untyped_storage().data_ptr() if has_memory else 0
    return address or id(tensor)


def copy_model(
    model: nn.Module,
    replacements: Mapping[nn.Module | Tensor, nn.Module | Tensor],
) -> nn.Module:
    """A deep copy in which every reference to a key of `replacements` is one to its value.

    The keys themselves are never copied, so their memory is not needed twice. A module's
    replacement takes over its hooks. Raises ValueError where the model cannot be copied.
    """
    memo: dict[int, object] = {id(old): new for old, new in replacements.items()}
    try:
        copied = copy.deepcopy(model, memo)
        for old, new in replacements.items():
            for hooks in _HOOKS if isinstance(old, nn.Module) else ():
                # With the memo: a hook that is a method of the model becomes one of the copy.
                setattr(new, hooks, copy.deepcopy(getattr(old, hooks), memo))
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"trine works on a copy of the model, but it cannot be copied: {error}"
        ) from error
    return copied


def close_fast_paths(model: nn.Module, kind: type[nn.Module] = PackedLinear) -> None:
    """Make torch's transformer encoder call its linear layers where one of them is of that kind.

    Its fast path hands `linear1.weight` to a fused float kernel, and so leaves the layer aside: a
    packed one would be unpacked in every call, one in training would not be quantised.
    """
    for module in model.modules():
        if not any(isinstance(child, kind) for child in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # only the fast path can take nested tensors
