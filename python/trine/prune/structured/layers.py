"""Take whole layers out of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trine.calibration.probe import check_fits, probing, run, tensors_in
from trine.compress.edits import record
from trine.compress.layers import copy_model, require_module
from trine.compress.observe import as_batches
from trine.distill.succession import renumber_layers
from trine.prune.structured.remove import same_outputs


def drop_layers(model: nn.Module, example_inputs: Any, names: str | Iterable[str]) -> nn.Module:
    """A copy of `model` in which what goes into the named layers passes them by.

    Layers of an nn.ModuleList are taken out of it; the numbers that layers of transformers carry
    for the cache of keys and values, and the configuration, are brought up to date. Any other
    becomes nn.Identity. On the examples the copy is checked against the model with these layers
    skipped.

    Args:
        model: is left untouched.
        example_inputs: a tensor, a tuple of arguments, a mapping of keyword arguments, or a list of
            such calls.
        names: of modules that return their first input's shape (residual blocks, encoder layers),
            none inside of another.

    Raises:
        ValueError: no such module; all layers of a list; a layer that changes the shape, is called
            in another way than once per call or gives others more than its output (as T5's first
            one does with its position bias).
    """
    require_module(model, "drop_layers")
    batches = as_batches(example_inputs)
    for batch in batches:
        check_fits(model, batch)
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    _check(model, names)
    skipped = _outputs_without(model, names, batches)
    small = copy_model(model, {})
    modules = dict(small.named_modules())
    lists: dict[str, list[int]] = {}
    for name in names:
        path, _, key = name.rpartition(".")
        if isinstance(modules[path], nn.ModuleList):
            lists.setdefault(path, []).append(int(key))
        else:
            setattr(modules[path], key, nn.Identity())
    for path, gone in lists.items():
        _take_out(small, path, gone)
    try:
        with probing(small) as probe:
            outputs = [x for batch in batches for x in tensors_in(run(probe, batch))]
    except Exception as error:  # whatever the model's own code raises
        raise ValueError(
            f"the model without {', '.join(names)} cannot run ({type(error).__name__}: {error})"
        ) from error
    if not same_outputs(outputs, skipped):
        raise ValueError(
            f"others need more of {', '.join(names)} than the output that is passed on; keep the "
            "layer that gives it"
        )
    record(model, small)
    return small


def _check(model: nn.Module, names: list[str]) -> None:
    modules = dict(model.named_modules())
    if not names:
        raise ValueError("drop_layers: no layer is named")
    for name in names:
        if not name or name not in modules:
            raise ValueError(f"drop_layers: the model has no layer {name!r}")
        if any(name.startswith(f"{other}.") for other in names):
            raise ValueError(f"drop_layers: {name!r} is inside of another named layer")
        path = name.rpartition(".")[0]
        siblings = {f"{path}.{key}" if path else key for key in modules[path]._modules}
        if isinstance(modules[path], nn.ModuleList) and siblings <= set(names):
            raise ValueError(f"drop_layers: nothing would be left of {path!r}")


def _outputs_without(model: nn.Module, names: list[str], batches: list[Any]) -> list[Tensor]:
    """What the model returns when these layers hand on what they were given."""
    calls = dict.fromkeys(names, 0)

    def skip(name: str):
        def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            calls[name] += 1
            given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            made = output[0] if isinstance(output, tuple) else output
            if given is None or not isinstance(made, Tensor) or made.shape != given.shape:
                raise ValueError(
                    f"drop_layers: {name!r} does not return a tensor of its first input's shape, "
                    "so nothing can pass it by"
                )
            return (given, *output[1:]) if isinstance(output, tuple) else given

        return hook

    with probing(model) as probe, torch.no_grad():
        for name in names:
            probe.get_submodule(name).register_forward_hook(skip(name), with_kwargs=True)
        outputs = [x for batch in batches for x in tensors_in(run(probe, batch))]
    for name, count in calls.items():
        if not count:
            raise ValueError(f"drop_layers: no example reached {name!r}")
    return outputs


def _take_out(model: nn.Module, path: str, gone: list[int]) -> None:
    parent, _, key = path.rpartition(".")
    layers = model.get_submodule(path)
    kept = [number for number in range(len(layers)) if number not in gone]
    setattr(model.get_submodule(parent), key, nn.ModuleList(layers[number] for number in kept))
    renumber_layers(model, path, kept, len(layers))
