"""What was changed in a model's structure after it was built, as plain data, and the same again.

Pruning shrinks layers, low rank replaces them, sharing and dropping take them away: the code that
built the model knows nothing of it. A list of edits leads from the structure as built to the
changed one. Each is a pair of a module's name and one of

    {"module": description or None}     another module there (see `trees`), {"same_as": name}, none
    {"children": [key, ...]}            the children that stay, in this order
    {"shapes": {key: shape or None}}    parameters and buffers of another shape, or none
    {"attributes": {key: value}}        other numbers in attributes that the module has already
    {"ties": {key: name or None}}       the parameter or buffer of that name, or one of its own

in the order in which they are made. No edit runs code or names a class outside of a fixed table.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from trine.compress.layers import copy_model, stands_for
from trine.compress.tensors import tensors_of
from trine.compress.trees import build_tree, describe_tree, refuse_explosion
from trine.nn import PackedLayer

Edit = tuple[str, dict[str, Any]]

# Convolutions derive private attributes from these, so that changing them is not enough.
_DERIVED_FROM = {"kernel_size", "padding", "dilation", "padding_mode"}

# What transformers notes in a model about how it was made.
_NOT_STRUCTURE = {"training", "name_or_path", "is_quantized", "quantization_method"}


class _Indescribable(Exception):
    """Something was changed in a way that no edit can express."""


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model's structure that takes no memory: all its tensors are on meta."""
    tensors = {
        tensor: nn.Parameter(tensor.detach().to("meta"), tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else tensor.to("meta")
        for tensor in chain(model.parameters(), model.buffers())
    }
    return copy_model(model, tensors)


def record(before: nn.Module, after: nn.Module) -> None:
    """Note in `after` what distinguishes its structure from that of `before`, for `trine.save`.

    Whoever changes the structure of a copy calls it, so that `trine.load` can make the same
    changes to what `like` returns. What `before` holds already, from an earlier change, counts.
    `before` may be its `skeleton`, taken before a change in place. Where the change cannot be
    described `like` must return the changed structure.
    """
    earlier = recorded(before)
    now = difference(skeleton(before), after)
    after._trine_edits = None if earlier is None or now is None else [*earlier, *now]


def recorded(model: nn.Module) -> list[Edit] | None:
    """All that `record` noted: [] for a model as it was built, None for what has no description."""
    return getattr(model, "_trine_edits", [])


def restore(model: nn.Module, edits: list[Edit]) -> None:
    """Note in a loaded model what was recorded in the one that was saved."""
    if edits:
        model._trine_edits = edits


def difference(base: nn.Module, model: nn.Module) -> list[Edit] | None:
    """The edits that make `base` a model of the same structure; None where there are none such.

    `base`, whose values have no meaning, is changed on the way. Packed layers count as
    those that they stand for.
    """
    if not _can_become(base, model):
        return None
    walk = _Walk(base)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            walk.module(model, base, "")
            walk.ties(model)
    except _Indescribable:
        return None
    return walk.edits if same_structure(model, base) else None


def apply(model: nn.Module, edits: list[Edit]) -> None:
    """Make the edits, in order; new tensors have no meaningful values.

    Raises ValueError for what `difference` would not have written for such a model.
    """
    if not isinstance(edits, list):
        raise ValueError(f"edits of a model are a list, not {type(edits).__name__}")
    for edit in edits:
        try:
            name, change = edit
            ((kind, value),) = change.items()
            _MAKE[kind](model, name, value)
        except Exception as error:  # a constructor may raise anything for values not made for it
            raise ValueError(f"the edit {edit!r} of the model is malformed ({error!r})") from error


# ---- making one edit ----


def _find(model: nn.Module, name: str) -> nn.Module:
    """Not `get_submodule`, which would run properties."""
    for key in name.split(".") if name else ():
        model = model._modules[key]
    return model


class _ByName(dict[str, nn.Module]):
    """The modules of a model by name, looked up when asked for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __missing__(self, name: str) -> nn.Module:
        return _find(self.model, name)


def _put_module(model: nn.Module, name: str, description: dict[str, Any] | None) -> None:
    path, _, key = name.rpartition(".")
    parent = _find(model, path)
    if description is None:
        module = None
    else:
        module = build_tree(description, _ByName(model), name)
        if any(parent is inner for inner in module.modules()):
            raise ValueError("a module cannot be inside of itself")
    if key in parent._modules:
        parent._modules[key] = module
    else:
        parent.add_module(key, module)
    refuse_explosion(model)


def _keep_children(model: nn.Module, name: str, keys: list[str]) -> None:
    module = _find(model, name)
    module._modules = {key: module._modules[key] for key in keys}


def _reshape(model: nn.Module, name: str, shapes: dict[str, list[int] | None]) -> None:
    module = _find(model, name)
    for key, shape in shapes.items():
        tensors = _slots(module, key)
        old = tensors[key]
        if shape is None:
            tensors[key] = None
        else:
            empty = torch.empty(shape) if old is None else old.new_empty(shape)
            tensors[key] = _of_its_own(module, key, empty)


def _set_attributes(model: nn.Module, name: str, attributes: dict[str, Any]) -> None:
    own = vars(_find(model, name))
    for key, value in attributes.items():
        value = tuple(value) if isinstance(value, list) else value
        if not (_is_number(value) and not key.startswith("_") and type(own[key]) is type(value)):
            raise ValueError(f"{key!r} is no attribute to be set to {value!r}")
        own[key] = value


def _tie(model: nn.Module, name: str, ties: dict[str, str | None]) -> None:
    module = _find(model, name)
    for key, other in ties.items():
        tensors = _slots(module, key)
        old = tensors[key]
        if other is None:
            tensors[key] = _of_its_own(module, key, torch.empty_like(old))
            continue
        path, _, other_key = other.rpartition(".")
        tensor = _slots(_find(model, path), other_key)[other_key]
        if tensor.shape != old.shape or type(tensor) is not type(old):
            raise ValueError(f"{key!r} cannot be tied to {other!r}")
        tensors[key] = tensor


_MAKE = {
    "module": _put_module,
    "children": _keep_children,
    "shapes": _reshape,
    "attributes": _set_attributes,
    "ties": _tie,
}


def _slots(module: nn.Module, key: str) -> dict[str, Tensor | None]:
    """The parameters or the buffers, whichever hold the key."""
    tensors = module._parameters if key in module._parameters else module._buffers
    if key not in tensors:
        raise ValueError(f"{key!r} is no parameter or buffer")
    return tensors


def _of_its_own(module: nn.Module, key: str, empty: Tensor) -> Tensor:
    return nn.Parameter(empty) if key in module._parameters else empty


def _is_number(value: object) -> bool:
    """Whether it is a number, a truth value, or a tuple of such."""
    if isinstance(value, tuple):
        return all(_is_number(item) for item in value)
    return isinstance(value, bool | int | float)


# ---- finding the edits ----


class _Walk:
    """Goes through the model, parents first, and edits `base` until it has the same structure."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.edits: list[Edit] = []
        self.names: dict[nn.Module, str] = {}  # of the model's modules met so far
        self.used: set[nn.Module] = set()  # those of the base that stand for one of the model

    def edit(self, name: str, kind: str, value: Any) -> None:
        _MAKE[kind](self.base, name, value)
        self.edits.append((name, {kind: value}))

    def module(self, module: nn.Module, twin: nn.Module, name: str) -> None:
        self.names[module] = name
        self.used.add(twin)
        if isinstance(module, PackedLayer):
            return
        for kind, value in _changes(module, twin):
            self.edit(name, kind, value)
        for key, child in module._modules.items():
            self.child(child, twin, key, f"{name}.{key}" if name else key)
        if list(module._modules) != list(twin._modules):
            self.edit(name, "children", list(module._modules))

    def child(self, child: nn.Module | None, parent: nn.Module, key: str, name: str) -> None:
        twin = parent._modules.get(key)
        if child is None:
            if twin is not None or key not in parent._modules:
                self.edit(name, "module", None)
        elif child in self.names:
            if twin is None or _find(self.base, self.names[child]) is not twin:
                self.edit(name, "module", {"same_as": self.names[child]})
        elif twin is not None and twin not in self.used and _can_become(twin, child):
            self.module(child, twin, name)
        else:
            description = describe_tree(child, dict(self.names), name)
            if description is None:
                raise _Indescribable
            self.edit(name, "module", description)
            twin = parent._modules[key]
            if not _can_become(twin, child):
                raise _Indescribable
            self.module(child, twin, name)  # for what was changed in the child itself

    def ties(self, model: nn.Module) -> None:
        """With the same modules everywhere: which of their tensors are the same."""
        modules = dict(model.named_modules(remove_duplicate=False))
        packed = {
            twin: modules[name]
            for name, twin in self.base.named_modules(remove_duplicate=False)
            if isinstance(modules.get(name), PackedLayer)
        }
        (tensors, wanted), (_, found) = tensors_of(model), tensors_of(self.base, packed)
        for name in chain(tensors, wanted):
            if wanted.get(name) != found.get(name):
                path, _, key = name.rpartition(".")
                if isinstance(modules[path], PackedLayer):
                    raise _Indescribable
                self.edit(path, "ties", {key: wanted.get(name)})


def _can_become(twin: nn.Module, module: nn.Module) -> bool:
    """Whether edits of its tensors and attributes make `twin` such a module."""
    if isinstance(module, PackedLayer):
        return stands_for(module, twin)
    here, there = settings(module), settings(twin)
    changed = dict(_changes(module, twin)).get("attributes", {})
    return (
        type(module) is type(twin)
        and module._parameters.keys() == twin._parameters.keys()
        and module._buffers.keys() == twin._buffers.keys()
        and here.keys() == there.keys()
        and not changed.keys() & _DERIVED_FROM
        and all(_is_number(v) and type(v) is type(there[key]) for key, v in changed.items())
    )


def _changes(module: nn.Module, twin: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    here, there = _shapes(module), _shapes(twin)
    shapes = {
        key: None if here.get(key) is None else list(here[key])
        for key in chain(module._parameters, module._buffers)
        if here.get(key) != there.get(key)
    }
    if shapes:
        yield "shapes", shapes
    here, there = settings(module), settings(twin)
    attributes = {key: value for key, value in here.items() if there.get(key, value) != value}
    if attributes:
        yield "attributes", attributes


# ---- comparing ----


def same_structure(model: nn.Module, twin: nn.Module) -> bool:
    """Whether both have the same modules in the same places, with equal shapes and settings."""
    modules = list(model.named_modules(remove_duplicate=False))
    twins = list(twin.named_modules(remove_duplicate=False))
    return [name for name, _ in modules] == [name for name, _ in twins] and all(
        _same_module(module, other) for (_, module), (_, other) in zip(modules, twins, strict=True)
    )


def _same_module(module: nn.Module, twin: nn.Module) -> bool:
    if isinstance(module, PackedLayer):
        return stands_for(module, twin)
    return (
        type(module) is type(twin)
        and "forward" not in vars(module)
        and _shapes(module) == _shapes(twin)
        and settings(module) == settings(twin)
    )


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    tensors = {**module._parameters, **module._buffers}
    return {name: tensor.shape for name, tensor in tensors.items() if tensor is not None}


def settings(module: nn.Module) -> dict[str, Any]:
    """The public attributes of plain types, such as an eps that was changed after building."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str | tuple | NoneType)
        and not name.startswith("_")
        and name not in _NOT_STRUCTURE
    }
