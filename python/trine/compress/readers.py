"""Who reads what a module returns, in a run over sample inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from trine.calibration.probe import module_names, probing, run, tensors_in
from trine.compress.observe import Call, call_of

# What a QuantizedRows can be asked, too.
_HARMLESS = frozenset(
    {
        Tensor.shape.__get__,
        Tensor.dtype.__get__,
        Tensor.device.__get__,
        Tensor.dim,
    }
)


@dataclass
class Readers:
    """Of one module's results, over all samples."""

    calls: Counter[Call] = field(default_factory=Counter)  # of the module itself
    layers: dict[str, None] = field(default_factory=dict)  # those asked about, in their order
    other: str | None = None  # the first reader that is none of them, in words


def find_readers(
    model: nn.Module,
    sources: Mapping[str, Callable[[nn.Module, Tensor, Tensor], str | None]],
    layers: frozenset[str],
    batches: list[Any],
) -> dict[str, Readers]:
    """Which of `layers`, and what else, reads the results of each module named in `sources`.

    Everything counts that Python does with such a tensor, views and getters too, but what
    `_HARMLESS` lists; and that the model returns it. The model itself is not run: a copy is (see
    `trine.calibration.probe.probing`). What the model raises comes through.

    Args:
        sources: by name, what looks at a call: of the module, its x and its result it gives None,
            or in words why something else must be said to read the result.
        layers: names of modules.
        batches: those of `trine.compress.observe.as_batches`.
    """
    found = {name: Readers() for name in sources}
    with probing(model) as probe, module_names(probe) as running:
        watch = _Watch(found, running, dict(probe.named_modules()))
        for name, look in sources.items():
            probe.get_submodule(name).register_forward_hook(watch.source(name, look))
        for name in layers:
            layer = probe.get_submodule(name)
            layer.register_forward_pre_hook(watch.enter(name), with_kwargs=True)
            layer.register_forward_hook(watch.leave)
        for batch in batches:
            with watch:
                output = run(probe, batch)
            for tensor in tensors_in(output):
                watch.note(tensor, "the model returns it")
    return found


class _Watch(TorchFunctionMode):
    def __init__(
        self, found: dict[str, Readers], running: list[str], modules: dict[str, nn.Module]
    ) -> None:
        super().__init__()
        self._found = found
        self._running = running
        self._modules = modules
        self._inside = 0  # of one of the layers
        # Tensors are held on to, so that an id stays one tensor's.
        self._results: dict[int, tuple[Tensor, str]] = {}

    def source(self, name: str, look: Callable[[nn.Module, Tensor, Tensor], str | None]):
        def hook(module: nn.Module, args: tuple, result: Tensor) -> None:
            with self._not_watching():
                if args[0].numel():
                    self._found[name].calls[call_of(args[0])] += 1
                reason = look(module, args[0], result)
            self._results[id(result)] = result, name
            if reason is not None:
                self.note(result, reason)

        return hook

    def enter(self, name: str):
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._inside += 1
            for x in (*args, *kwargs.values()):
                if id(x) in self._results:
                    self._found[self._results[id(x)][1]].layers[name] = None

        return hook

    def leave(self, _module: nn.Module, _args: tuple, _output: object) -> None:
        self._inside -= 1

    def note(self, tensor: object, reason: str) -> None:
        """Where the tensor is a result, and nothing else was noted of it."""
        if id(tensor) in self._results:
            readers = self._found[self._results[id(tensor)][1]]
            readers.other = readers.other or reason

    @contextmanager
    def _not_watching(self):
        self._inside += 1
        yield
        self._inside -= 1

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self._inside and function not in _HARMLESS:
            for x in pytree.tree_leaves((args, kwargs)):
                if id(x) in self._results:
                    self.note(x, self._reading(function))
        return function(*args, **kwargs)

    def _reading(self, function: Callable) -> str:
        name = self._running[-1]
        module = self._modules[name]
        kind = type(module).__name__
        who = f"{name!r} ({kind}) reads it" if name else f"the model ({kind}) reads it"
        if not module._modules:
            return who  # a layer: what it does is known
        return f"{who} ({resolve_name(function) or getattr(function, '__name__', function)})"
