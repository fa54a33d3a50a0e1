"""How fast a layer is against its factorised form, at the shapes that it was seen with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trine.calibration.probe import probing, run
from trine.compress.measure import Timer


@dataclass(frozen=True)
class Input:
    """One kind of input of a layer."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    autocast: torch.dtype | None  # the dtype that autocast imposes on the call, None without it


def inputs_of(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: list[Any]
) -> dict[str, Counter[Input]]:
    """How often each layer is called with which input, over all batches; a copy is run."""
    seen: dict[str, Counter[Input]] = {name: Counter() for name in layers}

    def look(name: str):
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            enabled = torch.is_autocast_enabled(x.device.type)
            autocast = torch.get_autocast_dtype(x.device.type) if enabled else None
            if x.numel():
                seen[name][Input(tuple(x.shape), x.dtype, autocast)] += 1

        return hook

    with probing(model) as probe:
        for name in layers:
            probe.get_submodule(name).register_forward_pre_hook(look(name), with_kwargs=True)
        for batch in batches:
            run(probe, batch)
    return seen


@dataclass
class Stopwatch:
    """Times layers; those of one class, shape, rank and input share their result."""

    timer: Timer
    inputs: Mapping[str, Counter[Input]]
    _known: dict[tuple, tuple[float, float]] = field(default_factory=dict)

    def seconds(self, name: str, layer: nn.Module, built: nn.Module) -> tuple[float, float] | None:
        """Seconds that both take in a run over all samples; None where no sample came by."""
        if not self.inputs[name]:
            return None
        totals = [0.0, 0.0]
        for seen, calls in self.inputs[name].items():
            for at, seconds in enumerate(self._once(layer, built, seen)):
                totals[at] += calls * seconds
        return totals[0], totals[1]

    def _once(self, layer: nn.Module, built: nn.Module, seen: Input) -> tuple[float, float]:
        case = (str(layer), str(built), layer.weight.dtype, seen)
        if case not in self._known:
            device = layer.weight.device
            generator = torch.Generator().manual_seed(0)  # the caller's state stays as it is
            x = torch.randn(seen.shape, generator=generator).to(device, seen.dtype)
            with torch.autocast(device.type, seen.autocast, enabled=seen.autocast is not None):
                # forward, not the call: the user's hooks are for the user's data.
                seconds = self.timer(
                    {"float": lambda: layer.forward(x), "factorised": lambda: built.forward(x)}
                )
            self._known[case] = (seconds["float"], seconds["factorised"])
        return self._known[case]
