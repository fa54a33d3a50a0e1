"""Capture: the right tensors, under every wrapper that people train in."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from trine.distill import Capture


class Block(nn.Module):
    """Returns two tensors, as attention layers do."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        if self.use_reentrant is not None and torch.is_grad_enabled():
            y = checkpoint(self.linear, x, use_reentrant=self.use_reentrant)
        else:
            y = self.linear(x)
        return y.relu(), y


class Model(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(**options) for _ in range(2))
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(1, 1)

    def forward(self, x):
        for block in self.blocks:
            x, _ = block(x)
        return self.head(x)


PATHS = {"h": "blocks.0", "before": "blocks.1:1", "pooled": "head:input"}


def by_hand(model: Model, x):
    first = model.blocks[0].linear(x).relu()
    before = model.blocks[1].linear(first)
    return {
        "h": first,
        "before": before,
        "pooled": before.relu(),
        "logits": model.head(before.relu()),
    }


def assert_view_of(model: Model, called: nn.Module, x) -> None:
    """The values, and the gradients that come from them."""
    capture = Capture(called, PATHS)
    output, view = capture(x)
    expected = by_hand(model, x)
    assert view.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(view[name], expected[name])
    assert output is view["logits"]
    weight = model.blocks[0].linear.weight
    expected_grad = torch.autograd.grad(sum(v.square().sum() for v in expected.values()), weight)[0]
    model.zero_grad()
    sum(v.square().sum() for v in view.values()).backward()
    torch.testing.assert_close(weight.grad, expected_grad)
    capture.close()


def test_values_and_gradients():
    model = Model()
    assert_view_of(model, model, torch.randn(5, 4))


def test_nothing_is_kept_of_other_calls():
    model = Model()
    capture = Capture(model, PATHS)
    _, view = capture(torch.randn(5, 4))
    before = {name: tensor.clone() for name, tensor in view.items()}
    model(torch.randn(7, 4))
    assert all(torch.equal(view[name], before[name]) for name in before)
    capture.close()
    with pytest.raises(ValueError, match="did not run"):
        capture(torch.randn(5, 4))


@pytest.mark.parametrize("captured_first", [False, True])
def test_compiled(captured_first):
    model, x = Model(), torch.randn(5, 4)
    if captured_first:
        capture = Capture(model, PATHS)
        capture.model = torch.compile(model, backend="eager")
    else:
        capture = Capture(torch.compile(model, backend="eager"), PATHS)
    expected = by_hand(model, x)
    for _ in range(2):
        _, view = capture(x)
        for name in expected:
            torch.testing.assert_close(view[name], expected[name])
    view["h"].sum().backward()
    assert model.blocks[0].linear.weight.grad is not None


def test_distributed():
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        model = Model()
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        assert_view_of(model, wrapped, torch.randn(5, 4))
    finally:
        dist.destroy_process_group()


def test_checkpointed():
    """What is computed again in the backward pass is not captured, and gradients are right."""
    model = Model(use_reentrant=False)
    assert_view_of(model, model, torch.randn(5, 4))
    capture = Capture(model, {"y": "blocks.0.linear"})
    _, view = capture(torch.randn(5, 4))
    kept = view["y"]
    view["logits"].sum().backward()
    assert view["y"] is kept


def test_reentrant_checkpoints_are_refused_where_they_hide_the_graph():
    model = Model(use_reentrant=True)
    capture = Capture(model, {"y": "blocks.1.linear"})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        capture(torch.randn(5, 4))
    with torch.no_grad():
        capture(torch.randn(5, 4))  # a teacher has no graph anyway


def test_outputs_of_hugging_face():
    class Encoder(nn.Module):
        def forward(self, x):
            return SimpleNamespace(logits=x, hidden_states=(x, 2 * x), attentions=None)

    x = torch.randn(2, 3)
    _, view = Capture(Encoder())(x)
    assert view.keys() == {"logits", "hidden_states.0", "hidden_states.1"}
    assert torch.equal(view["hidden_states.1"], 2 * x)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"h": "blocks.7"}, "no module 'blocks.7'; it has, among others, 'blocks'"),
        ({"h": "blocks.0:output"}, "':input' or the number of an output"),
        ({"logits": "head"}, "the name 'logits' is taken"),
    ],
)
def test_paths_that_are_wrong(paths, message):
    with pytest.raises(ValueError, match=message):
        Capture(Model(), paths)


@pytest.mark.parametrize(
    ("path", "message"), [("unused", "'unused' did not run"), ("blocks.0:2", "has 2 tensors")]
)
def test_modules_that_give_nothing(path, message):
    with pytest.raises(ValueError, match=message):
        Capture(Model(), {"h": path})(torch.randn(5, 4))
