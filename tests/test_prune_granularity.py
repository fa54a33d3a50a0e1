"""Groups of weights by hand: N:M, neurons, channels, heads, layers; and where they end."""

import pytest
import torch
import trine
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D
from trine.nn import Sparse24Linear
from trine.prune import (
    NM,
    Channel,
    Cubic,
    Global,
    Head,
    Layer,
    Magnitude,
    Movement,
    Neuron,
    PerLayer,
    Pruner,
    RigL,
    Threshold,
    Weight,
    as_sparse24,
    drop_layers,
    remove,
)
from trine.quantize import two_of_four


@pytest.mark.parametrize("columns", [4, 6, 7, 32])
def test_two_of_four_by_magnitude(columns):
    """The mask of trine.quantize.two_of_four, with many ties, zeros of both signs, short groups."""
    layer = nn.Linear(columns, 64, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-2, 3, (64, columns)) * torch.tensor(-0.5))
    dense = layer.weight.detach().clone()
    pruner = Pruner(nn.Sequential(layer), Magnitude(), NM(2, 4), PerLayer(0.5))
    expected = torch.where(two_of_four(dense), dense, 0)
    assert torch.equal(layer.weight, expected)
    packed = Sparse24Linear.from_linear(layer)
    assert torch.equal(packed.dense_weight(), layer.weight)
    twin = nn.Linear(columns, 64, bias=False)
    twin.weight.data.copy_(dense)
    other = Sparse24Linear.from_linear(twin)
    assert torch.equal(packed.values, other.values)
    assert torch.equal(packed.indices, other.indices)
    assert "yes" in str(pruner.report())


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 8), (3, 5)])
def test_n_of_m_keeps_the_best_of_each_group(n, m):
    """Of any scores, here with signs; on a transposed layer the groups go along its inputs."""

    class Scores(Magnitude):
        def scores(self, model, layers):
            return {name: layer.weight.detach().double() for name, layer in layers.items()}

    for layer in (nn.Linear(21, 6).double(), Conv1D(6, 21).double()):
        dense = layer.weight.detach().clone()
        Pruner(nn.Sequential(layer), Scores(), NM(n, m), PerLayer(1 - n / m))
        rows = dense.T if isinstance(layer, Conv1D) else dense
        now = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        for row, kept in zip(rows.tolist(), (now != 0).tolist(), strict=True):
            for start in range(0, 21, m):
                group, marks = row[start : start + m], kept[start : start + m]
                best = sorted(range(len(group)), key=lambda i: -group[i])[:n]
                assert marks == [i in best for i in range(len(group))]


def test_n_of_m_on_the_way_is_of_the_worst():
    """A cubic schedule reaches 2:4 by removing the worst of what may go; RigL keeps to it."""
    x, y = torch.randn(32, 8), torch.randn(32, 4)
    for criterion, schedule in ((Magnitude(), Cubic(0, 6)), (Magnitude(), RigL(6, 2))):
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        parts = (criterion, NM(2, 4), PerLayer(0.5), schedule)
        pruner = Pruner(model, *parts, optimizer=optimizer)
        for step in range(1, 7):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
            pruner.step()
            for layer in (model[0], model[2]):
                gone = (layer.weight == 0).unflatten(1, (-1, 4)).sum(-1)
                if isinstance(schedule, RigL) or step == 6:
                    assert (gone >= 2).all()
                else:
                    assert (gone <= 2).all()
        small = as_sparse24(pruner.finish())
        assert torch.equal(small[0].dense_weight(), model[0].weight)


def test_compress_packs_what_is_left():
    """The recipe "sparse24" has nothing more to remove: the packed weights are the pruned ones."""
    model, x = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)), torch.randn(3, 32)
    Pruner(model, Magnitude(), NM(2, 4), PerLayer(0.5)).finish()
    small = trine.compress(model.eval(), trine.Recipe("sparse24", prefer="size"), x)
    for packed, pruned in zip(small, model, strict=True):
        if isinstance(pruned, nn.Linear):
            assert isinstance(packed, Sparse24Linear)
            assert torch.equal(packed.dense_weight(), pruned.weight)
    assert torch.equal(small(x), as_sparse24(model)(x))


def test_ratios_that_a_pattern_does_not_allow():
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"24 of 32 groups would be removed .* at most 16 can be"):
        Pruner(model, Magnitude(), NM(2, 4), PerLayer(0.75))
    with pytest.raises(ValueError, match="needs 0 < n < m; got n=4, m=4"):
        NM(4, 4)


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize(
    ("layer", "granularity"),
    [
        (nn.Linear(5, 9), Neuron()),
        (Conv1D(9, 5), Neuron()),
        (nn.Conv2d(3, 9, 2), Channel()),
        (nn.Conv2d(9, 9, 3, groups=9), Channel()),
    ],
    ids=["linear", "transposed", "convolution", "depthwise"],
)
def test_outputs_of_least_norm(layer, granularity, norm):
    """L1 and L2 norms of the rows; the bias goes with them."""
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    model = nn.ModuleDict({"layer": layer.double()})
    rows = layer.weight.T if isinstance(layer, Conv1D) else layer.weight.flatten(1)
    norms = torch.linalg.vector_norm(rows, ord=norm, dim=1)
    pruner = Pruner(model, Magnitude(norm), granularity, PerLayer(4 / 9))
    off = sorted(norms.argsort()[:4].tolist())
    assert pruner.removed() == {"layer": off}
    assert pruner.dropped() == []
    now = layer.weight.T if isinstance(layer, Conv1D) else layer.weight.flatten(1)
    on = [i for i in range(9) if i not in off]
    assert not now[off].any()
    assert not layer.bias[off].any()
    assert now[on].all()
    assert layer.bias[on].all()


def test_heads_of_least_norm():
    """Of query, key and value together; grouped queries; fused; a layer behind is none of them."""
    size, heads = 3, 4
    model = nn.ModuleDict(
        {
            "plain": nn.ModuleDict({name: nn.Linear(5, heads * size) for name in "qkv"}),
            "grouped": nn.ModuleDict(
                {"q": nn.Linear(5, 2 * heads * size), "v": nn.Linear(5, heads * size)}
            ),
        }
    )
    expected = {}
    for name, attention in model.items():
        of_heads = [layer.weight.unflatten(0, (heads, -1)) for layer in attention.values()]
        worth = sum(rows.abs().double().sum((1, 2)) for rows in of_heads)
        worst = worth.argsort()[:2].tolist()
        for which, layer in attention.items():
            width = layer.out_features // heads
            rows = [head * width + i for head in sorted(worst) for i in range(width)]
            expected[f"{name}.{which}"] = rows
    assert Pruner(model, Magnitude(), Head(heads), PerLayer(0.5)).removed() == expected

    fused = nn.ModuleDict({"attention": nn.ModuleDict({"c": Conv1D(3 * heads * size, 5)})})
    weight = fused["attention"]["c"].weight.detach()  # [5, 3 * heads * size]
    worth = weight.abs().double().unflatten(1, (3, heads, size)).sum((0, 1, 3))
    worst = worth.argmin().item()
    rows = [part * 12 + worst * size + i for part in range(3) for i in range(size)]
    pruner = Pruner(fused, Magnitude(), Head(heads, fused=3), PerLayer(0.25))
    assert pruner.removed() == {"attention.c": rows}


def test_blocks_of_least_score():
    blocks = nn.ModuleList(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in "abc"
    )
    model = nn.ModuleDict({"blocks": blocks, "head": nn.Linear(4, 2)})
    worth = [sum(p.abs().sum() for p in block.parameters() if p.dim() > 1) for block in blocks]
    worst = min(range(3), key=lambda i: worth[i])
    parts = (Magnitude(), Layer("blocks.*"), Global(1 / 3))
    pruner = Pruner(model, *parts, layers="blocks.*")
    assert pruner.dropped() == [f"blocks.{worst}"]
    assert pruner.removed() == {}
    assert not any(p.any() for p in blocks[worst].parameters())
    with pytest.raises(ValueError, match=r"'head' is in no block 'blocks\.\*'"):
        Pruner(model, *parts)


class Block(nn.Linear):
    def forward(self, x):
        return x + super().forward(x).relu()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(6, 6) for _ in range(3))
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.last(self.first(x).relu())


def test_what_is_off_is_really_removed():
    """What `removed` and `dropped` say goes into the functions that make a model smaller."""
    model, x = Residual(), torch.randn(5, 6)
    neurons = Pruner(model, Magnitude(), Neuron(), PerLayer(0.5), layers="first")
    layers = Pruner(model, Magnitude(), Layer(), Global(1 / 3), layers="blocks.*")
    expected = layers.finish()(x)
    small = remove(model, x, neurons.removed())
    assert small.first.out_features == 4
    assert small.last.in_features == 4
    torch.testing.assert_close(small(x), expected)
    small = drop_layers(small, x, layers.dropped())
    assert len(small.blocks) == 2
    torch.testing.assert_close(small(x), expected)


def test_soft_movement_needs_no_ratio():
    scope = Threshold(0.5)
    scores = {"a": torch.tensor([0.4, 0.5, 0.6, torch.inf])}
    assert scope.keep(scores, lambda aim: aim)["a"].tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match="RigL keeps a ratio and Threshold has none"):
        Pruner(nn.Sequential(nn.Linear(2, 2)), Movement(), Weight(), scope, RigL(2, 1, begin=1))


@given(
    st.lists(
        st.sampled_from([-torch.inf, -1.0, 0.0, 0.5, 2.0, 3e38, torch.inf]), min_size=1, max_size=40
    ),
    st.floats(0, 0.99),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_the_lowest_go_and_among_equals_the_last(scores, ratio, dtype):
    kept = PerLayer(ratio).keep({"a": torch.tensor(scores, dtype=dtype)}, lambda aim: aim)["a"]
    order = sorted(range(len(scores)), key=lambda i: (scores[i], -i))
    may_go = [i for i in order if scores[i] != torch.inf]
    gone = set(may_go[: round(ratio * len(scores))])
    assert kept.tolist() == [i not in gone for i in range(len(scores))]


def test_report_says_what_is_saved():
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4))
    Pruner(model, Magnitude(), NM(2, 4), PerLayer(0.5), layers="2").finish()
    pruner = Pruner(model, Magnitude(), Neuron(), PerLayer(0.5), Cubic(0, 10), layers="0")
    pruner.step()
    lines = str(pruner.report()).splitlines()
    head = "layer weights zero outputs off 2:4 saved now to save something"
    assert lines[0].split() == head.split()
    assert lines[1].split() == ["0", "32", "25.0%", "1", "of", "4", "nothing", "trine.prune.remove"]
    expected = "25.0% of the weights are 0; the model has its size and speed still"
    assert lines[2] == f"{expected}; the schedule was at update 1 of 10"
    both = Pruner(model, Magnitude(), scope=PerLayer({"0": 0.25, "2": 0.5})).report()
    assert [layer.zeros for layer in both.layers] == [8, 8]
    assert both.layers[1].next_step == 'trine.compress, linear="sparse24"'
    assert both.sparsity == pytest.approx(16 / 48)


@pytest.mark.parametrize(
    ("granularity", "layer", "message"),
    [
        (Neuron(), nn.Conv2d(2, 2, 1), "Neuron: layer '0' is a Conv2d; use Channel"),
        (Channel(), nn.Linear(2, 2), "Channel: layer '0' is a Linear; use Neuron"),
        (Head(3), nn.Linear(2, 8), "has 8 outputs, which are not 1 times 3 heads"),
    ],
)
def test_layers_that_do_not_fit(granularity, layer, message):
    with pytest.raises(ValueError, match=message):
        Pruner(nn.Sequential(layer), Magnitude(), granularity, PerLayer(0.5))
