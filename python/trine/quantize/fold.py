"""Batch norms that only scale and shift what one layer gives: which they are, and folding them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trine.quantize.batch_norm import FoldedNorm

# What a batch norm may follow, each with the batch norm that counts its channels in the same place.
_NORM_AFTER: dict[type[nn.Module], type[_BatchNorm]] = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}


def fold_batch_norm(
    model: nn.Module, example_inputs: Any = None, *, batch_norms: Mapping[str, str] | None = None
) -> nn.Module:
    """A copy of `model` for inference in which layers do what the batch norms after them did.

        W <- W gamma / sigma,    b <- beta + (b - mu) gamma / sigma,    sigma^2 = variance + eps

    of nn.Linear and nn.Conv1d, 2d and 3d whose output a batch norm reads and nothing else does; the
    batch norm becomes nn.Identity.

    Args:
        model: any module; it is not touched.
        example_inputs: what the model is called with (as for `trine.calibrate`; the first batch is
            run) to find out which batch norms follow which layers.
        batch_norms: tells so instead: names of layers, each with that of its batch norm.

    Returns:
        The copy, in evaluation mode. Its attribute `folded_batch_norms` names the layers that took
        up a batch norm, each with that.

    Raises:
        ValueError: neither examples nor names; names of no such pair; no batch norm that could be
            folded; the model cannot be copied. What the model raises on the examples comes through.
    """
    # Imported here because it builds on this package.
    from trine.compress.edits import record
    from trine.compress.layers import copy_model, require_module

    require_module(model, "fold_batch_norm")
    if example_inputs is None and batch_norms is None:
        raise ValueError(
            "fold_batch_norm needs example_inputs, which show what follows what, or batch_norms"
        )
    pairs = norms_to_fold(model, example_inputs, batch_norms)
    if not pairs:
        raise ValueError(
            "fold_batch_norm: no batch norm with running statistics reads a linear layer or a "
            "convolution that nothing else reads"
        )
    replacements: dict[nn.Module, nn.Module] = {}
    for name, norm_name in pairs.items():
        layer, norm = model.get_submodule(name), model.get_submodule(norm_name)
        replacements |= {layer: _folded(layer, FoldedNorm(norm)), norm: nn.Identity()}
    changed = copy_model(model, replacements).eval()
    changed.folded_batch_norms = pairs
    record(model, changed)
    return changed


@torch.no_grad()
def _folded(layer: nn.Module, norm: FoldedNorm) -> nn.Module:
    result = copy.deepcopy(layer)
    result.weight = nn.Parameter(norm.fold_weight(layer.weight), layer.weight.requires_grad)
    bias = norm.fold_bias(layer.bias, layer.weight.dtype)
    result.bias = nn.Parameter(bias, layer.weight.requires_grad)
    return result


def norms_to_fold(
    model: nn.Module, example_inputs: Any, batch_norms: Mapping[str, str] | None
) -> dict[str, str]:
    """Names of layers, each with that of the batch norm to fold: those given, or those found.

    None are found without examples. Raises ValueError for names of no such pair.
    """
    if batch_norms is not None:
        _check_names(model, batch_norms)
        return dict(batch_norms)
    foldable = {id(norm) for norm in model.modules() if _misfit_of_norm(norm, model) is None}
    if example_inputs is None or not foldable:
        return {}
    return {
        name: norm_name
        for name, norm_name in _followed(model, first_batch(example_inputs)).items()
        if id(model.get_submodule(norm_name)) in foldable and name not in _blocked(model, [name])
    }


def first_batch(data: Any) -> Any:
    """The first batch of data as `trine.calibrate` takes it."""
    if isinstance(data, Tensor | tuple | Mapping):
        return data
    batch = next(iter(data), None)
    if batch is None:
        raise ValueError("there is no data; give at least one batch")
    return batch


def _blocked(model: nn.Module, names: list[str]) -> dict[str, str]:
    from trine.compress.layers import obstacles_of

    return obstacles_of(model, {name: model.get_submodule(name) for name in names})


def _misfit_of_norm(norm: nn.Module, model: nn.Module) -> str | None:
    """Why it cannot be folded, whatever it follows."""
    if type(norm) not in _NORM_AFTER.values():
        return f"it is a {type(norm).__name__}"
    if norm.running_mean is None:
        return "it has no running statistics"
    own = {id(p) for p in norm.parameters()}
    others = (m for m in model.modules() if m is not norm)
    if any(id(p) in own for m in others for p in m._parameters.values()):
        return "its parameters are shared with another module"
    return None


def _check_names(model: nn.Module, batch_norms: Mapping[str, str]) -> None:
    modules = dict(model.named_modules())
    for names in batch_norms.items():
        if missing := [name for name in names if name not in modules]:
            raise ValueError(f"batch_norms: the model has no module {missing[0]!r}")
        name, norm_name = names
        layer, norm = (modules[n] for n in names)
        if reason := _misfit_of_norm(norm, model):
            raise ValueError(f"batch_norms: {norm_name!r} cannot be folded: {reason}")
        if _NORM_AFTER.get(type(layer)) is not type(norm) or len(layer.weight) != norm.num_features:
            raise ValueError(
                f"batch_norms: {norm_name!r} ({type(norm).__name__} of {norm.num_features}) does "
                f"not fit {name!r} ({type(layer).__name__})"
            )
        if reason := _blocked(model, [name]).get(name):
            raise ValueError(f"batch_norms: {name!r} cannot take up a batch norm: {reason}")
    if len(set(batch_norms.values())) < len(batch_norms):
        raise ValueError("batch_norms: two layers cannot take up the same batch norm")


def _followed(model: nn.Module, batch: Any) -> dict[str, str]:
    """Layers of which every output is read by one batch norm alone, which reads nothing else."""
    from trine.calibration.probe import check_fits, probing, run

    check_fits(model, batch)
    with probing(model) as probe:
        reads = _Reads()
        for name, module in probe.named_modules():
            if type(module) in _NORM_AFTER:
                module.register_forward_hook(reads.after_layer(name))
            elif type(module) in _NORM_AFTER.values():
                module.register_forward_pre_hook(reads.before_norm(name))
                module.register_forward_hook(reads.after_norm)
        with reads:
            output = run(probe, batch)
        for leaf in tree_leaves(output):
            reads.note(leaf)
        return dict(reads.pairs(probe))


class _Reads(TorchDispatchMode):
    """Who reads the outputs of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[Tensor, str]] = {}  # held on to, so that an id stays its own
        self.readers: dict[int, list[str | None]] = {}  # a batch norm, or None for all else
        self.calls: Counter[str] = Counter()
        self.is_in_norm = False

    def after_layer(self, name: str):
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            self.calls[name] += 1
            if isinstance(output, Tensor):
                self.made[id(output)] = (output, name)
                self.readers[id(output)] = []

        return hook

    def before_norm(self, name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            self.calls[name] += 1
            if args and id(args[0]) in self.made:
                self.readers[id(args[0])].append(name)
            self.is_in_norm = True

        return hook

    def after_norm(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.is_in_norm = False

    def note(self, value: Any) -> None:
        if isinstance(value, Tensor) and id(value) in self.made:
            self.readers[id(value)].append(None)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.is_in_norm:
            for value in tree_leaves((args, kwargs)):
                self.note(value)
        return operator(*args, **kwargs)

    def pairs(self, model: nn.Module) -> Iterator[tuple[str, str]]:
        found: dict[str, set] = {}
        for key, (output, name) in self.made.items():
            readers, rows = self.readers[key], type(model.get_submodule(name)) is nn.Linear
            # BatchNorm1d counts the channels of three dimensions in the second, not in the last.
            fits = len(readers) == 1 and not (rows and output.dim() != 2)
            found.setdefault(name, set()).add(readers[0] if fits else None)
        for name, readers in found.items():
            (norm, *others) = readers
            if norm is not None and not others and self.calls[norm] == self.calls[name]:
                kind = type(model.get_submodule(norm))
                if kind is _NORM_AFTER[type(model.get_submodule(name))]:
                    yield name, norm
