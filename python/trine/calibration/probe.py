"""Running a model to look at it, so that the model and the random state do not notice."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)


@contextmanager
def probing(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of `model` to run, in evaluation mode, without gradients and with every layer called.

    The copy shares the parameters alone (a forward pass writes buffers at most), so hooks, buffers
    and modes of the model stay as they are even where a run fails; every random state is restored
    at the end. Raises ValueError where the model cannot be copied.
    """
    shared = {id(parameter): parameter for parameter in model.parameters()}
    try:
        probe = copy.deepcopy(model, shared).eval()
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"trine works on a copy of the model, but it cannot be copied: {error}"
        ) from error
    # The fast path of nn.TransformerEncoderLayer reads weights and calls no layer.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
            yield probe
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def run(model: nn.Module, batch: Any) -> Any:
    """Call the model with a tensor, a tuple (or list) of arguments, or a mapping of them."""
    positional, named = _arguments(batch)
    return model(*positional, **named)


def check_fits(model: nn.Module, batch: Any) -> None:
    """Raises ValueError where `batch` is no batch, or none that the model's forward can take."""
    if not isinstance(batch, Tensor | tuple | list | Mapping):
        raise ValueError(
            "a batch must be a tensor, a tuple of arguments or a mapping of keyword arguments; got "
            f"{type(batch).__name__}"
        )
    positional, named = _arguments(batch)
    try:
        inspect.signature(model.forward).bind(*positional, **named)
    except TypeError as error:
        raise ValueError(
            f"{type(model).__name__}.forward cannot be called with such a batch ({error}); give "
            "what the model is called with and no labels, as in `(x for x, _ in loader)`"
        ) from None


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors of what a model returns; what a cache of keys and values holds is its own."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from tensors_in(value)
    elif is_dataclass(output) and not isinstance(output, type):
        for field in fields(output):
            yield from tensors_in(getattr(output, field.name))


@contextmanager
def module_names(model: nn.Module) -> Iterator[list[str]]:
    """A list whose last entry is the name of the module that is running, while one is."""
    names = {module: name for name, module in model.named_modules()}
    stack = [""]

    def enter(module: nn.Module, _args: tuple) -> None:
        stack.append(names.get(module, stack[-1]))

    def leave(_module: nn.Module, _args: tuple, _output: object) -> None:
        stack.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def _arguments(batch: Any) -> tuple[tuple, Mapping]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), batch
    return tuple(batch), {}
