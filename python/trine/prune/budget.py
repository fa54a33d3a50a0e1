"""A ratio for each layer, so that the model fits a budget and loses least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trine.calibration import calibrate
from trine.compress.measure import Timer
from trine.compress.observe import as_batches
from trine.evaluate.latency import alternate
from trine.nn.packed import is_conv1d
from trine.prune.curves import Sensitivity
from trine.prune.layers import by_row

__all__ = ["budget_ratios", "latency_costs", "mac_costs", "size_costs"]

Costs = dict[str, tuple[float, ...]]
_STATES = 4096  # kept at most: more than enough for the exact answer with a dozen layers


def budget_ratios(
    curves: Sensitivity, costs: Mapping[str, Sequence[float]], budget: float
) -> dict[str, float]:
    """The ratio for each layer with the least total loss within the budget.

    Losses of layers are taken to add up, as they are known for one layer at a time. With
    L_l(r) = `curves.losses()` it solves: minimise sum_l L_l(r_l) subject to
    sum_l cost_l(r_l) <= budget * sum_l cost_l(0), by going through the layers and keeping every
    total that no other beats in both loss and cost. Where there are more than 4096 of them, the
    costs are told apart to 1/4096 of the budget only.

        curves = sensitivity(model, evaluate)
        ratios = budget_ratios(curves, size_costs(model, curves), 0.5)
        Pruner(model, Magnitude(), scope=PerLayer(ratios))

    Args:
        curves: of `sensitivity`.
        costs: of each layer at ratio 0 and at each of `curves.ratios`: `size_costs`, `mac_costs`,
            `latency_costs`, or any other figures.
        budget: the share of the dense layers' cost that may be left, in (0, 1].

    Returns:
        A ratio by layer, of `curves.ratios` or 0, for `PerLayer`.

    Raises:
        ValueError: a budget that the largest ratios do not reach (it says what they do reach), or
            costs that do not fit the curves.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget_ratios: budget is {budget}; it is a share of the cost, in (0, 1]")
    losses, options = curves.losses(), (0.0, *curves.ratios)
    if costs.keys() != losses.keys() or any(len(c) != len(options) for c in costs.values()):
        raise ValueError(
            f"budget_ratios: costs must have {len(options)} figures (ratio 0 and those of the "
            "curves) for each layer of the curves"
        )
    total = sum(of_layer[0] for of_layer in costs.values())
    least = sum(min(of_layer) for of_layer in costs.values())
    limit = budget * total * (1 + 1e-12)  # sums in another order
    if least > limit:
        raise ValueError(
            f"budget_ratios: a budget of {budget:.3g} cannot be reached; the ratios of the curves "
            f"leave {least / total:.3g} of the cost at the least"
        )
    # What the layers to come cost at the least: states that leave no room for it are dropped.
    to_come = {}
    rest = least
    for name, of_layer in costs.items():
        rest -= min(of_layer)
        to_come[name] = rest
    states: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]
    for name, of_layer in costs.items():
        grown = [
            (cost + more, loss + losses[name][i], (*taken, i))
            for cost, loss, taken in states
            for i, more in enumerate(of_layer)
            if cost + more + to_come[name] <= limit
        ]
        states = _unbeaten(grown, limit)
    chosen = min(states, key=lambda state: (state[1], state[0]))[2]
    return {name: options[i] for name, i in zip(costs, chosen, strict=True)}


def _unbeaten(states: list[tuple], limit: float) -> list[tuple]:
    """By cost, each losing less than all that are cheaper; at most 4096."""
    kept: list[tuple] = []
    for state in sorted(states):
        if not kept or state[1] < kept[-1][1]:
            kept.append(state)
    if len(kept) <= _STATES:
        return kept
    cheapest = {round(_STATES * state[0] / limit): state for state in reversed(kept)}
    return sorted(cheapest.values())


def size_costs(model: nn.Module, curves: Sensitivity) -> Costs:
    """Bytes of each layer's weight that are left: (1 - ratio) * weights * bytes of one."""
    weights = {name: _weight(model, name) for name in curves.scores}
    return _remaining(curves, {name: w.numel() * w.itemsize for name, w in weights.items()})


def mac_costs(model: nn.Module, curves: Sensitivity, example_inputs: Any) -> Costs:
    """Multiply-adds of each layer on the examples: (1 - ratio) * rows * weights.

    A row is one vector that a linear layer is called with, one window of a convolution.
    Raises ValueError as `trine.calibrate` does.
    """
    rows = calibrate(model, example_inputs, _Rows, layers=curves.scores)
    return _remaining(
        curves,
        {name: found.count * _weight(model, name).numel() for name, found in rows.items()},
    )


def latency_costs(
    model: nn.Module, curves: Sensitivity, example_inputs: Any, *, timer: Timer = alternate
) -> Costs:
    """Measured seconds of each layer on the examples, with the share of its outputs removed.

    For curves whose granularity removes whole outputs (`Neuron`, `Channel`): single weights that
    are 0 save no time. Each layer is timed at the shapes that the examples give it, as it is and
    with the first outputs alone, all in turns.

    Raises:
        ValueError: no example reaches a layer, a convolution with groups.
    """
    from trine.factorize.measure import inputs_of

    layers = {name: model.get_submodule(name) for name in curves.scores}
    seen = inputs_of(model, layers, as_batches(example_inputs))
    costs: Costs = {}
    for name, layer in layers.items():
        if not seen[name]:
            raise ValueError(f"latency_costs: no example reached layer '{name}'")
        smaller = {ratio: _fewer_outputs(name, layer, ratio) for ratio in (0.0, *curves.ratios)}
        totals = dict.fromkeys(smaller, 0.0)
        for one, times in seen[name].items():
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(one.shape, generator=generator).to(layer.weight.device, one.dtype)
            with torch.autocast(x.device.type, one.autocast, enabled=one.autocast is not None):
                calls = {str(ratio): (lambda m=m, x=x: m(x)) for ratio, m in smaller.items()}
                seconds = timer(calls)
            for ratio in totals:
                totals[ratio] += times * seconds[str(ratio)]
        costs[name] = tuple(totals.values())
    return costs


class _Rows:
    """How many rows a layer was called with."""

    def __init__(self) -> None:
        self.count = 0

    def update(self, rows: torch.Tensor) -> None:
        self.count += rows.shape[-2]


def _fewer_outputs(name: str, layer: nn.Module, ratio: float) -> nn.Module:
    n, k = by_row(layer, layer.weight).shape
    left = max(1, n - round(ratio * n))
    biased = layer.bias is not None
    options = {"bias": biased, "device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear) or is_conv1d(layer):
        return nn.Linear(k, left, **options)
    if layer.groups > 1:
        raise ValueError(
            f"latency_costs: layer '{name}' has groups, whose channels go with those before it; "
            "leave it out of the curves"
        )
    return type(layer)(
        layer.in_channels,
        left,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        padding_mode=layer.padding_mode,
        **options,
    )


def _weight(model: nn.Module, name: str) -> torch.Tensor:
    return model.get_submodule(name).weight


def _remaining(curves: Sensitivity, dense: Mapping[str, float]) -> Costs:
    return {
        name: tuple(cost * (1 - ratio) for ratio in (0.0, *curves.ratios))
        for name, cost in dense.items()
    }
