"""Float against compressed, for one layer on the shapes that it was seen with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from trine.compress.observe import Call

# Takes calls by name, gives seconds per call by the same names: evaluate.latency.alternate, or a
# substitute that tests control.
Timer = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, float]]


@dataclass
class Measurements:
    """Times layers, each distinct case once: layers of one shape and dtype share their result."""

    timer: Timer
    _known: dict[tuple, tuple[float, float]] = field(default_factory=dict)

    def seconds(
        self, layer: nn.Module, compressed: nn.Module, choice: str, call: Call
    ) -> tuple[float, float]:
        """Seconds per call of the float layer and of the compressed one, on random data."""
        device = layer.weight.device
        shape = tuple(layer.weight.shape)
        has_bias = getattr(layer, "bias", None) is not None
        kind = (type(layer), shape, layer.weight.dtype, device, has_bias)
        if isinstance(layer, nn.Conv2d):
            kind += (layer.stride, layer.padding, layer.dilation, layer.groups)
        case = (kind, choice, call)
        if case not in self._known:
            x = call.example(layer)
            # forward, not the call: the user's hooks are for the user's data.
            with torch.autocast(device.type, call.autocast, enabled=call.autocast is not None):
                seconds = self.timer(
                    {"float": lambda: layer.forward(x), choice: lambda: compressed.forward(x)}
                )
            self._known[case] = (seconds["float"], seconds[choice])
        return self._known[case]
