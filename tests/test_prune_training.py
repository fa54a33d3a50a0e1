"""The Pruner in trainings: against loops written out here, killed, spread, and in odd hands."""

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_pruner import trained
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trine.distill import Distiller, Fixed, Training
from trine.distill.objectives import Labels
from trine.prune import (
    Change,
    Cubic,
    Global,
    Iterative,
    Magnitude,
    Movement,
    Neuron,
    OneShot,
    PerLayer,
    Pruner,
    Random,
    RigL,
    Taylor,
    Weight,
)

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(5))
Y = (X[:, 0] > 0).long()


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def backward(model) -> None:
    model.zero_grad()
    nn.functional.cross_entropy(model(X), Y).backward()


def train(model, optimizer, pruner, steps: int) -> None:
    for _ in range(steps):
        backward(model)
        optimizer.step()
        pruner.step()


def adam(model):
    return torch.optim.AdamW(model.parameters(), 0.02)


def weights(model):
    return [layer.weight for layer in model if isinstance(layer, nn.Linear)]


def test_gradual_magnitude_pruning_by_hand():
    """Zhu & Gupta's formula, a mask per layer, and Adam on what is kept alone."""
    model, own = network(), network()
    own.load_state_dict(model.state_dict())
    optimizer, plain = adam(model), adam(own)
    schedule = Cubic(begin=2, end=10, every=3, initial=0.2)
    pruner = Pruner(model, Magnitude(), Weight(), PerLayer(0.7), schedule, optimizer=optimizer)
    masks = [torch.ones_like(w) for w in weights(own)]
    for step in range(1, 14):
        backward(own)
        for w, mask in zip(weights(own), masks, strict=True):
            w.grad *= mask
        plain.step()
        if step in (2, 5, 8, 10):
            ratio = 0.7 + (0.2 - 0.7) * (1 - (step - 2) / 8) ** 3
            for w, mask in zip(weights(own), masks, strict=True):
                lowest = (w * mask).abs().flatten().argsort()[: round(ratio * w.numel())]
                mask.view(-1)[lowest] = 0
        for w, mask in zip(weights(own), masks, strict=True):
            w.data *= mask
            for moment in ("exp_avg", "exp_avg_sq"):
                plain.state[w][moment] *= mask
        train(model, optimizer, pruner, 1)
        for actual, expected in zip(weights(model), weights(own), strict=True):
            torch.testing.assert_close(actual, expected)
    for w in weights(model):
        assert (w == 0).sum() == round(0.7 * w.numel())
        assert not optimizer.state[w]["exp_avg"][w == 0].any()


def test_global_magnitude_by_hand():
    model = network()
    together = sorted(w for layer in weights(model) for w in layer.abs().flatten().tolist())
    limit = together[round(0.6 * 64)]
    before = [w.detach().clone() for w in weights(model)]
    Pruner(model, Magnitude(), scope=Global(0.6)).finish()
    for actual, dense in zip(weights(model), before, strict=True):
        assert torch.equal(actual, torch.where(dense.abs() >= limit, dense, 0))


def test_a_winning_ticket_starts_again():
    """After round i of n, 1 - (1 - s)^(i/n) is gone and the rest is what it was at the start."""
    model = network()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = adam(model)
    schedule = Iterative(rounds=3, every=4, rewind=0)
    pruner = Pruner(model, Magnitude(), Weight(), Global(0.9), schedule, optimizer=optimizer)
    gone = torch.zeros(64, dtype=torch.bool)
    for i in range(1, 4):
        train(model, optimizer, pruner, 3)
        backward(model)
        optimizer.step()
        trained = torch.cat([w.detach().abs().flatten() for w in weights(model)])
        pruner.step()
        lowest = trained.masked_fill(gone, 0).argsort()[: round((1 - 0.1 ** (i / 3)) * 64)]
        assert gone[gone].sum() <= len(lowest)
        gone[lowest] = True
        now = torch.cat([w.detach().flatten() for w in weights(model)])
        assert torch.equal(now == 0, gone)
        for name, value in model.state_dict().items():
            kept = value != 0
            assert torch.equal(value[kept], start[name][kept])
        assert not optimizer.state  # and the optimiser with it
    assert gone.sum() == round(0.9 * 64)


def test_a_ticket_of_an_early_update():
    model = network()
    optimizer = adam(model)
    schedule = Iterative(rounds=2, every=3, rewind=1)
    pruner = Pruner(model, Magnitude(), Weight(), PerLayer(0.5), schedule, optimizer=optimizer)
    train(model, optimizer, pruner, 1)
    early = [w.detach().clone() for w in weights(model)]
    moments = [optimizer.state[w]["exp_avg"].clone() for w in weights(model)]
    optimizer.param_groups[0]["lr"] = 0.01  # a schedule of the loop
    train(model, optimizer, pruner, 2)
    for w, at_first, moment in zip(weights(model), early, moments, strict=True):
        assert 0 < (w == 0).sum() < round(0.5 * w.numel())
        assert torch.equal(w, torch.where(w == 0, 0, at_first))
        assert torch.equal(optimizer.state[w]["exp_avg"], torch.where(w == 0, 0, moment))
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_rigl_by_hand():
    """Drops the smallest of what is on, grows the largest gradients of all that is off then."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    schedule = RigL(end=12, every=4, share=0.4)
    pruner = Pruner(model, Magnitude(), Weight(), PerLayer(0.6), schedule, optimizer=optimizer)
    masks = [w != 0 for w in weights(model)]
    for step in range(1, 13):
        on = masks.copy()
        backward(model)
        dense = [w.grad.clone() for w in weights(model)]
        optimizer.step()
        moved = [
            torch.where(mask, w, 0).detach() for w, mask in zip(weights(model), on, strict=True)
        ]
        pruner.step()
        for i, (w, was_on) in enumerate(zip(weights(model), on, strict=True)):
            grad, value = dense[i], moved[i]
            expected = was_on.clone().flatten()
            if step in (4, 8):
                share = 0.4 / 2 * (1 + math.cos(step * math.pi / 12))
                off = round((0.6 + share * 0.4) * w.numel())
                alive = value.abs().masked_fill(~was_on, -1).flatten()
                expected[alive.argsort()[:off]] = False
                grow = off - round(0.6 * w.numel())
                candidates = grad.abs().flatten().masked_fill(expected, -1)
                expected[candidates.argsort(descending=True)[:grow]] = True
            masks[i] = expected = expected.reshape(w.shape)
            assert torch.equal(pruner.masks()[f"{2 * i}.weight"], expected)
            assert torch.equal(w, torch.where(expected, value, 0))  # what comes back starts at 0
            assert not optimizer.state[w]["momentum_buffer"][~was_on].any()


PARTS = {
    "movement": lambda: (Movement(), Weight(), PerLayer(0.5), Cubic(1, 8)),
    "adam's movement": lambda: (
        Movement(optimizer=lambda scores: torch.optim.Adam(scores, 0.1)),
        Neuron(),
        PerLayer(0.5),
        Cubic(1, 8),
    ),
    "RigL": lambda: (Random(), Weight(), Global(0.5), RigL(8, 2)),
    "ticket": lambda: (Change(), Weight(), PerLayer(0.5), Iterative(3, 3, rewind=1)),
    "Taylor": lambda: (Taylor(), Neuron(), PerLayer(0.5), Cubic(1, 8, 2)),
}


@pytest.mark.parametrize("parts", PARTS)
def test_goes_on_with_the_same_bits(parts, tmp_path):
    whole = network()
    optimizer = adam(whole)
    torch.save(whole.state_dict(), tmp_path / "start.pt")
    pruner = Pruner(whole, *PARTS[parts](), optimizer=optimizer)
    train(whole, optimizer, pruner, 5)
    state = {"model": whole.state_dict(), "pruner": pruner.state_dict()}
    torch.save({**state, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(whole, optimizer, pruner, 5)

    again = network()
    again.load_state_dict(torch.load(tmp_path / "start.pt"))
    optimizer = adam(again)
    pruner = Pruner(again, *PARTS[parts](), optimizer=optimizer)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    pruner.load_state_dict(state["pruner"])
    train(again, optimizer, pruner, 5)
    for actual, expected in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_two_processes_prune_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    script = Path(__file__).with_name("run_pruner.py")
    command = [*launch, f"--master-port={port}", str(script), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, expected in trained(0, 1).items():
        assert torch.equal(first[name], second[name])
        assert torch.equal(first[name] == 0, expected == 0)
        torch.testing.assert_close(first[name], expected, rtol=1e-4, atol=1e-6)


# Inside of other loops


class Interrupted(Exception):
    pass


def distil(student, folder, *, stop_at=None, clip=1.0, ema=0.5):
    """A Distiller's training with movement pruning; after `stop_at` evaluations it is killed."""
    pruner = Pruner(student, Movement(), Weight(), PerLayer(0.5), Cubic(1, 6), skip="2")
    seen = []

    def evaluate(model):
        seen.append((model[0].weight == 0).sum().item())
        if len(seen) == stop_at:
            raise Interrupted
        return -seen[-1]  # best before anything is pruned

    settings = dict(epochs=4, learning_rate=0.02, ema=ema, clip=clip, parallel="none")
    distiller = Distiller(
        student,
        None,
        Labels(),
        Fixed({"hard": 1.0}),
        pruner=pruner,
        training=Training(**settings),
        folder=folder,
    )
    distiller.fit(DataLoader(TensorDataset(X, Y), 8), evaluate)
    return pruner, seen


def test_in_a_distiller(tmp_path):
    """Eight updates: the average and the best are pruned, too; a killed one goes on."""
    student, again = network(), network()
    again.load_state_dict(student.state_dict())
    start = {name: value.clone() for name, value in student.state_dict().items()}
    pruner, seen = distil(student, tmp_path / "whole")
    assert pruner.finish() is student
    assert pruner.done
    assert (student[0].weight == 0).sum() == 24
    assert not (student[2].weight == 0).any()
    assert seen[0] < seen[1] < seen[2] == seen[3] == 24
    with pytest.raises(Interrupted):
        distil(again, tmp_path / "killed", stop_at=3)
    again.load_state_dict(start)
    distil(again, tmp_path / "killed")
    for name, value in again.state_dict().items():
        assert torch.equal(value, student.state_dict()[name])


def test_in_a_loop_of_accelerate():
    """With accumulation: what is no update does not count."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    optimizer = adam(model)
    model, prepared = accelerator.prepare(model, optimizer)
    parts = (Movement(), Weight(), PerLayer(0.5), OneShot(3))
    pruner = Pruner(model, *parts, optimizer=prepared)
    for batch in range(1, 11):
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(X), Y))
            prepared.step()
            pruner.step()
            prepared.zero_grad()
        assert pruner.position == batch // 2
        assert pruner.done == (batch >= 6)
    assert all((w == 0).sum() == w.numel() / 2 for w in weights(model))
    assert not any(optimizer.state[w]["exp_avg"][w == 0].any() for w in weights(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nothing_is_left_of_what_is_pruned(dtype):
    """Not of a gradient that is no number, either, and in weights of any strides."""
    layer = nn.Linear(6, 4, dtype=dtype)
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(layer, Magnitude(), scope=PerLayer(0.5), optimizer=optimizer)
    off = ~pruner.masks()["weight"]
    assert off.sum() == 12
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.full_like(before, torch.nan).where(off, torch.ones_like(before))
    optimizer.step()
    pruner.step()
    assert (layer.weight[off] == 0).all()
    assert (optimizer.state[layer.weight]["momentum_buffer"][off] == 0).all()
    torch.testing.assert_close(layer.weight[~off], before[~off] - 0.1)


def test_clipping_does_not_see_what_is_pruned():
    model = network()
    pruner = Pruner(model, Magnitude(), scope=PerLayer(0.5), optimizer=adam(model))
    backward(model)
    with torch.no_grad():
        expected = sum((p.grad[p != 0] ** 2).sum() for p in model.parameters()).sqrt()
    pruner.collect()
    torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), 1.0), expected)


# Errors, each with the model untouched


class Spoilt(Magnitude):
    def scores(self, model, layers):
        scores = super().scores(model, layers)
        scores["2"][0, 0] = math.nan
        return scores


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((Magnitude(),), {}, "say how much to prune"),
        ((Spoilt(),), {"scope": PerLayer(0.5)}, "Spoilt: scores of layer '2' are NaN or infinite"),
        ((Magnitude(), Neuron()), {"scope": PerLayer(0.8)}, "of '2' 2 of 2 .* at most 1 can be"),
        ((Magnitude(), Neuron()), {"scope": Global(0.9)}, "9 of 10 groups would .* at most 8"),
        ((Magnitude(),), {"scope": PerLayer({"0": 0.5})}, "a ratio for each of 0, 2; it has .* 0"),
    ],
)
def test_prunings_that_cannot_be(arguments, options, message):
    model = network()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        Pruner(model, *arguments, **options)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_weights_that_are_not_finite():
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="layer '0' cannot be pruned: its weight holds NaN"):
        Pruner(model, Magnitude(), scope=PerLayer(0.5))
    assert (model[0].weight == 0).sum() == 0


def test_misuse():
    model = network()
    with pytest.raises(ValueError, match="has none of the weights that are pruned"):
        Pruner(model, Magnitude(), scope=PerLayer(0.5), optimizer=adam(network()))
    assert all(w.all() for w in weights(model))
    pruner = Pruner(model, Random(), scope=PerLayer(0.5), schedule=RigL(4, 1))
    with pytest.raises(ValueError, match="no gradients were collected; attach the optimiser"):
        pruner.step()
    with pytest.raises(ValueError, match="RigL: no gradient has reached layer '0'"):
        pruner.collect()
    with pytest.raises(ValueError, match="the state is that of another model or granularity"):
        pruner.load_state_dict(Pruner(network(), Magnitude(), Neuron(), PerLayer(0.5)).state_dict())
    pruner.finish()
    with pytest.raises(ValueError, match="it has finished"):
        pruner.step()
    moved = Pruner(network(), Magnitude(), scope=PerLayer(0.5))
    moved.model.to("meta")
    with pytest.raises(ValueError, match="the model was moved"):
        moved.attach(adam(moved.model))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PerLayer(1.0), r"a ratio is the share removed, in \[0, 1\); it is 1.0"),
        (lambda: Global(-0.1), r"in \[0, 1\); it is -0.1"),
        (lambda: Cubic(5, 5), "Cubic: end must be a whole number of at least 6, it is 5"),
        (lambda: Cubic(0, 5, initial=1.0), r"initial is a ratio in \[0, 1\)"),
        (lambda: Iterative(1, 5, rewind=5), r"rewind must be in \[0, every = 5\), it is 5"),
        (lambda: RigL(5, 1, share=1.0), r"share must lie in \(0, 1\), it is 1.0"),
        (lambda: OneShot(0.5), "at must be a whole number of at least 0, it is 0.5"),
    ],
)
def test_arguments_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()
