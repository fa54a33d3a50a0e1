"""The Pruner: every combination of its parts, against loops written out here, and in odd hands."""

import itertools

import pytest
import torch
from torch import nn
from trine.prune import (
    NM,
    SNIP,
    Change,
    Channel,
    Cubic,
    Fisher,
    Global,
    GraSP,
    Head,
    Iterative,
    Layer,
    Magnitude,
    Movement,
    Neuron,
    OneShot,
    PerLayer,
    Pruner,
    Random,
    RigL,
    SparseGPT,
    Taylor,
    Threshold,
    Wanda,
    Weight,
)

X = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1])


class Network(nn.Module):
    """A convolution, three layers as of an attention of two heads, two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.attention = nn.ModuleDict({name: nn.Linear(8, 8) for name in "qkv"})
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        x = self.stem(x).flatten(1).tanh()
        q, k, v = (layer(x) for layer in self.attention.values())
        x = x + (q * k).tanh() * v
        for block in self.blocks:
            x = x + block(x).tanh()
        return x


def loss_of(model, batch=(X, Y)):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(model, optimizer, pruner, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        pruner.step()


CRITERIA = {
    "magnitude": Magnitude,
    "magnitude L2": lambda: Magnitude(2),
    "random": Random,
    "change": Change,
    "movement": Movement,
    "SNIP": lambda: SNIP(loss_of, [(X, Y)]),
    "GraSP": lambda: GraSP(loss_of, [(X, Y)]),
    "Taylor": lambda: Taylor(loss_of, [(X, Y)]),
    "Taylor in training": Taylor,
    "Fisher": lambda: Fisher(loss_of, [(X, Y)]),
    "Wanda": lambda: Wanda([X]),
    "SparseGPT": lambda: SparseGPT([X]),
}
GRANULARITIES = {
    "weight": (Weight(), "blocks.*"),
    "2:4": (NM(2, 4), "blocks.*"),
    "neuron": (Neuron(), "blocks.*"),
    "channel": (Channel(), "stem"),
    "head": (Head(2), "attention.*"),
    "layer": (Layer("blocks.*"), "blocks.*"),
}
SCOPES = {
    "per layer": lambda: PerLayer(0.5),
    "global": lambda: Global(0.5),
    "threshold": lambda: Threshold(0.0),
}
SCHEDULES = {
    "one-shot": lambda: OneShot(at=1),
    "cubic": lambda: Cubic(1, 3),
    "rewind": lambda: Iterative(rounds=2, every=2, rewind=0),
    "RigL": lambda: RigL(end=4, every=1, begin=1),
}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_combination(criterion, granularity, threads):
    """Reaches its ratio, keeps what is pruned at 0 while training goes on; or says why it can't."""
    threads(1)
    start = Network()
    part, layers = GRANULARITIES[granularity]
    every = Pruner(start, Magnitude(), part, Global(0.0), layers=layers)
    sizes = {key: kept.numel() for key, kept in every.state_dict()["kept"].items()}
    for (scope_name, scope), (time, schedule) in itertools.product(
        SCOPES.items(), SCHEDULES.items()
    ):
        model = Network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        arguments = (model, CRITERIA[criterion](), part, scope(), schedule())
        by_layer = scope_name == "per layer"
        if (granularity == "layer" and by_layer) or (time == "RigL" and scope_name == "threshold"):
            with pytest.raises(ValueError, match=r"is a single group|Threshold has none"):
                Pruner(*arguments, layers=layers, optimizer=optimizer)
            continue
        pruner = Pruner(*arguments, layers=layers, optimizer=optimizer)
        train(model, optimizer, pruner, 4)
        kept = pruner.state_dict()["kept"]
        off = {key: int((~mask).sum()) for key, mask in kept.items()}
        if by_layer:
            assert off == {key: round(0.5 * size) for key, size in sizes.items()}
        elif scope_name == "global":
            assert sum(off.values()) == round(0.5 * sum(sizes.values()))
        assert pruner.done
        assert pruner.finish() is model
        masks = part.spread(pruner.layers, kept)
        for name, layer in pruner.layers.items():
            assert not layer.weight[~masks[name]].any()
            assert time == "RigL" or layer.weight[masks[name]].all()
