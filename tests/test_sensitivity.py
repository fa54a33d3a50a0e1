"""sensitivity and budgets: what is pruned, every bit comes back, the best ratios of all."""

import copy
from itertools import pairwise, product

import pytest
import torch
from fake_timers import says
from torch import nn
from trine.prune import (
    Magnitude,
    Neuron,
    PerLayer,
    Pruner,
    Sensitivity,
    Wanda,
    budget_ratios,
    latency_costs,
    mac_costs,
    sensitivity,
    size_costs,
)


def model_of(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(k, n) for k, n in pairwise(widths)))


def bits(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone().view(torch.int32) for p in model.parameters()]


def test_curves_are_those_of_each_layer_alone():
    model, x = model_of(8, 6, 4), torch.randn(5, 8)
    model[0].weight.data[0, :2] = torch.tensor([0.0, -0.0])  # the sign of a zero comes back, too
    before, told = bits(model), []

    def evaluate(pruned):
        assert pruned is model
        return -pruned(x).norm().item()

    found = sensitivity(model, evaluate, ratios=(0.25, 0.5), progress=told.append)
    assert all(torch.equal(a, b) for a, b in zip(bits(model), before, strict=True))
    assert told == [1, 2, 3, 4, 5]
    assert found.dense == evaluate(model)
    for layer in (0, 1):
        for place, ratio in enumerate((0.25, 0.5)):
            pruned = copy.deepcopy(model)
            weight = pruned[layer].weight.data
            lowest = weight.flatten().abs().argsort()[: int(ratio * weight.numel())]
            weight.view(-1)[lowest] = 0
            expected = -pruned(x).norm().item()
            assert found.scores[str(layer)][place] == pytest.approx(expected, abs=1e-6)


def test_whole_neurons_and_calibrated_scores():
    model, x = model_of(8, 6, 4), torch.randn(5, 8)
    before, zeros = bits(model), []

    def evaluate(pruned):
        zeros.append([(layer.weight == 0).all(1).sum().item() for layer in pruned])
        zeros[-1].append((pruned[0].bias == 0).sum().item())
        return 1.0

    sensitivity(model, evaluate, ratios=(0.5,), criterion=Wanda(x), granularity=Neuron())
    assert zeros == [[0, 0, 0], [3, 0, 3], [0, 2, 0]]
    assert all(torch.equal(a, b) for a, b in zip(bits(model), before, strict=True))


class Stop(Exception):
    pass


@pytest.mark.parametrize("how", [Stop(), KeyboardInterrupt(), float("nan")])
def test_every_bit_comes_back_when_evaluating_fails(how):
    model, calls = model_of(8, 6, 4), []
    before = bits(model)

    def evaluate(pruned):
        calls.append(None)
        if len(calls) < 3:
            return 1.0
        assert not torch.equal(pruned[0].weight.view(torch.int32), before[0])
        if isinstance(how, float):
            return how
        raise how

    expected = ValueError if isinstance(how, float) else type(how)
    with pytest.raises(expected, match="NaN for layer '0' pruned by 20%" if how != how else None):
        sensitivity(model, evaluate)
    assert all(torch.equal(a, b) for a, b in zip(bits(model), before, strict=True))


@pytest.mark.parametrize("ratios", [(), (0.5, 0.3), (0.0, 0.5), (0.5, 1.0), (0.2, 0.2)])
def test_ratios_must_ascend(ratios):
    with pytest.raises(ValueError, match="ratios must ascend between 0 and 1"):
        sensitivity(model_of(4, 4), lambda m: 1.0, ratios=ratios)


def test_nan_weights_are_refused():
    model = model_of(4, 4)
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="its weight holds NaN"):
        sensitivity(model, lambda m: 1.0)


def test_losses_never_fall():
    found = Sensitivity((0.1, 0.2, 0.3), 1.0, {"a": (1.1, 0.7, 0.8)})
    assert found.losses()["a"] == pytest.approx((0.0, 0.0, 0.3, 0.3))


def test_the_table_and_the_picture(tmp_path):
    found = Sensitivity((0.5, 0.9), 0.9, {"first": (0.8, 0.5), "encoder.last": (0.9, 0.89)})
    lines = str(found).splitlines()
    assert "50%" in lines[0]
    assert "90%" in lines[0]
    assert lines[1].split() == ["first", "0.9", "0.8", "0.5"]
    for name, start in (("curves.png", b"\x89PNG"), ("curves.svg", b"<?xml")):
        found.draw(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    assert len(list(tmp_path.iterdir())) == 2


# ---- budgets ----


def random_curves(layers: int, ratios: int, seed: int) -> tuple[Sensitivity, dict]:
    draws = torch.Generator().manual_seed(seed)
    steps = tuple((i + 1) / (ratios + 1) for i in range(ratios))
    falls = torch.rand(layers, ratios, generator=draws).cumsum(1)
    scores = {str(i): tuple((10 - f).tolist()) for i, f in enumerate(falls)}
    costs = torch.rand(layers, ratios + 1, generator=draws).sort(1, descending=True).values
    return Sensitivity(steps, 10.0, scores), {
        str(i): tuple(c.tolist()) for i, c in enumerate(costs)
    }


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [0.45, 0.7, 1.0])
def test_the_best_of_all_choices(seed, budget):
    curves, costs = random_curves(5, 3, seed)
    losses, options = curves.losses(), (0.0, *curves.ratios)
    limit = budget * sum(c[0] for c in costs.values())
    totals = [
        (sum(losses[n][i] for n, i in zip(costs, which, strict=True)), which)
        for which in product(range(4), repeat=5)
        if sum(costs[n][i] for n, i in zip(costs, which, strict=True)) <= limit
    ]
    if not totals:
        with pytest.raises(ValueError, match="cannot be reached"):
            budget_ratios(curves, costs, budget)
        return
    found = budget_ratios(curves, costs, budget)
    taken = [options.index(found[name]) for name in costs]
    loss = sum(losses[n][i] for n, i in zip(costs, taken, strict=True))
    assert loss == pytest.approx(min(totals)[0])
    assert sum(costs[n][i] for n, i in zip(costs, taken, strict=True)) <= limit * (1 + 1e-9)
    assert budget < 1 or set(found.values()) == {0.0}


def test_many_layers_stay_close_to_the_bound():
    """Far more totals than are kept: within 1% of the relaxation that may mix two ratios."""
    curves, costs = random_curves(40, 9, 0)
    found = budget_ratios(curves, costs, 0.5)
    losses, options = curves.losses(), (0.0, *curves.ratios)
    taken = {name: options.index(found[name]) for name in costs}
    limit = 0.5 * sum(c[0] for c in costs.values())
    assert sum(costs[n][i] for n, i in taken.items()) <= limit
    loss = sum(losses[n][i] for n, i in taken.items())
    # The dual bound: for any price of the cost, the sum of the cheapest choices.
    bound = max(
        sum(min(a + p * c for a, c in zip(losses[n], costs[n], strict=True)) for n in costs)
        - p * limit
        for p in torch.linspace(0, 20, 400).tolist()
    )
    assert bound <= loss <= 1.01 * bound


def test_size_macs_and_latency():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(16, 10))
    curves = Sensitivity((0.5,), 1.0, {"0": (0.9,), "2": (0.8,)})
    x = torch.randn(2, 3, 4, 4)
    assert size_costs(model, curves) == {"0": (432.0, 216.0), "2": (640.0, 320.0)}
    # 2 images of 2 x 2 windows; 2 rows.
    assert mac_costs(model, curves, x) == {"0": (8 * 108, 4 * 108), "2": (2 * 160, 160)}

    outputs = []

    def timer(calls):
        with torch.no_grad():
            shapes = [call().shape for call in calls.values()]
        outputs.append([shape[1] for shape in shapes])
        return {name: shape.numel() * 1.0 for name, shape in zip(calls, shapes, strict=True)}

    assert latency_costs(model, curves, x, timer=timer) == {"0": (32.0, 16.0), "2": (20.0, 10.0)}
    assert outputs == [[4, 2], [10, 5]]
    again = latency_costs(model, curves, [x, x], timer=timer)
    assert again == {"0": (64.0, 32.0), "2": (40.0, 20.0)}


def test_what_fits_no_budget_is_refused():
    curves = Sensitivity((0.5,), 1.0, {"0": (0.9,)})
    with pytest.raises(ValueError, match=r"leave 0\.5 of the cost at the least"):
        budget_ratios(curves, {"0": (2.0, 1.0)}, 0.3)
    with pytest.raises(ValueError, match="budget is 0"):
        budget_ratios(curves, {"0": (2.0, 1.0)}, 0)
    for costs in ({"1": (2.0, 1.0)}, {"0": (2.0,)}):
        with pytest.raises(ValueError, match="costs must have 2 figures"):
            budget_ratios(curves, costs, 0.5)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))
    with pytest.raises(ValueError, match="layer '0' has groups"):
        latency_costs(grouped, curves, torch.randn(1, 4, 2, 2), timer=says(1))
    with pytest.raises(ValueError, match="no example reached layer '0'"):
        latency_costs(grouped, curves, torch.empty(0, 4, 2, 2), timer=says(1))


def test_a_budget_is_what_is_pruned():
    model, x = model_of(16, 32, 8), torch.randn(20, 16)
    truth = model(x).detach()
    curves = sensitivity(model, lambda m: -(m(x) - truth).square().mean().item())
    ratios = budget_ratios(curves, size_costs(model, curves), 0.5)
    Pruner(model, Magnitude(), scope=PerLayer(ratios))
    zeros = sum(int((layer.weight == 0).sum()) for layer in model)
    assert zeros >= 0.5 * (16 * 32 + 32 * 8) - 2
