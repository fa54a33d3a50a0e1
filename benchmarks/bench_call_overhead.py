"""What a call of each layer costs where there is next to nothing to compute: (1, 64, 64)."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from trine.nn import pack_linear

from benchmarks.case import Comparison, Contestant, hot
from benchmarks.ceilings import Work

SIZE = 64
CHOICES = ("ternary", "int8", "sparse24", "sparse24-int8", "ternary24")
MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}


def comparisons(threads: int, quick: bool) -> Iterator[Comparison]:
    dense = nn.Linear(SIZE, SIZE)
    layers = {choice: pack_linear(dense, choice) for choice in CHOICES}
    x = torch.randn(1, SIZE)
    for name, mode in MODES.items():
        baseline = Contestant("nn.Linear", hot([partial(dense, x)]), Work(), None)
        about = dict(op="call_overhead", baseline=baseline.name)
        contestants = [
            Contestant(choice, hot([partial(layer, x)]), Work(), None, **about)
            for choice, layer in layers.items()
        ]
        shape = {"M": 1, "N": SIZE, "K": SIZE}
        yield Comparison(shape, name, [baseline, *contestants], mode=mode)
