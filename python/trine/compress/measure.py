"""Float against compressed, for one layer on the shapes that it was seen with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from trine.compress.observe import Call
from trine.nn import PackedLinear

# Takes calls by name, gives seconds per call by the same names: evaluate.latency.alternate, or a
# substitute that tests control.
Timer = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, float]]


@dataclass
class Measurements:
    """Times layers, each distinct case once: layers of one shape and dtype share their result."""

    timer: Timer
    _known: dict[tuple, tuple[float, float]] = field(default_factory=dict)

    def seconds(
        self, layer: nn.Module, compressed: PackedLinear, choice: str, call: Call
    ) -> tuple[float, float]:
        """Seconds per call of the float layer and of the compressed one, on random data."""
        device = layer.weight.device
        shape = tuple(layer.weight.shape)
        kind = (type(layer), shape, layer.weight.dtype, device, layer.bias is not None)
        case = (kind, choice, call)
        if case not in self._known:
            # A generator of its own: the caller's random state stays as it is.
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(call.rows, compressed.in_features, generator=generator)
            x = x.to(device, call.dtype)
            # forward, not the call: the user's hooks are for the user's data.
            with torch.autocast(device.type, call.autocast, enabled=call.autocast is not None):
                seconds = self.timer(
                    {"float": lambda: layer.forward(x), choice: lambda: compressed.forward(x)}
                )
            self._known[case] = (seconds["float"], seconds[choice])
        return self._known[case]
