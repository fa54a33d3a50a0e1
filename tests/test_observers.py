"""Ranges of activations, each against its definition over all values at once."""

import pytest
import torch
import trine
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from trine.quantize.observers import (
    BINS,
    Entropy,
    Histogram,
    MeanSquaredError,
    MinMax,
    MovingAverage,
    Percentile,
    grid,
)


def after(observer, *updates):
    for rows in updates:
        observer.update(rows)
    return observer


def quantised(x, low, high, symmetric=False):
    """The formulas, in float64."""
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if symmetric:
        scale, zero = 2 * max(-low, high) / 254, 0.0
    else:
        scale = (high - low) / 255
        zero = round(-low / scale) - 128
    q = ((x.double() / scale).round() + zero).clamp(-128, 127)
    return (q - zero) * scale


def test_grid_by_hand():
    scale, zero_point = grid(torch.tensor(-1.0), torch.tensor(1.55))
    assert scale.item() == pytest.approx(0.01)
    assert zero_point.item() == 100 - 128
    scale, zero_point = grid(torch.tensor(0.5), torch.tensor(2.55))  # 0 is always inside
    assert (scale.item(), zero_point.item()) == (pytest.approx(0.01), -128)
    scale, zero_point = grid(torch.tensor(-1.27), torch.tensor(0.3), symmetric=True)
    assert (scale.item(), zero_point.item()) == (pytest.approx(0.01), 0)
    assert [t.item() for t in grid(torch.tensor(0.0), torch.tensor(0.0))] == [1.0, -128]


@settings(max_examples=50, deadline=None)
@example(low=0.0, high=1e-45, symmetric=False)
@example(low=-1e-37, high=1e-38, symmetric=True)
@given(low=st.floats(-1e6, 1e6), high=st.floats(-1e6, 1e6), symmetric=st.booleans())
def test_the_grid_holds_zero_and_the_ends(low, high, symmetric):
    low, high = sorted((low, high))
    ends = torch.tensor([low, high])
    scale, zero_point = grid(*ends, symmetric=symmetric)
    q = ((ends / scale).round() + zero_point).clamp(-128, 127)
    error = ((q - zero_point) * scale - ends).abs().max()
    assert error <= scale * 1.001  # half a step, and half for the rounding of the zero point
    assert -128 <= zero_point.item() <= 127


def test_min_max_and_moving_average():
    a, b = torch.tensor([[-1.0, 2.0]]), torch.tensor([[-3.0, 1.0]])
    assert [t.item() for t in after(MinMax(), a, b).range()] == [-3, 2]
    ends = after(MovingAverage(0.75), a, b).range()
    assert [t.item() for t in ends] == pytest.approx([0.75 * -1 - 0.25 * 3, 0.75 * 2 + 0.25])
    with pytest.raises(ValueError, match="momentum"):
        MovingAverage(1.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=6), st.integers(0, 10**6))
def test_a_histogram_counts_every_value_once(magnitudes, seed):
    draws = torch.Generator().manual_seed(seed)
    updates = [2.0**m * torch.randn(5, 7, generator=draws) for m in magnitudes]
    histogram = after(Histogram(), torch.zeros(2, 3), *updates)
    values = torch.cat([torch.zeros(6), *(u.flatten() for u in updates)]).double()
    bins = (values / histogram.width).floor().long() + BINS // 2
    assert 0 <= bins.min() <= bins.max() < BINS
    assert torch.equal(torch.bincount(bins, minlength=BINS).double(), histogram.counts)


def test_a_histogram_of_zeros():
    for observer in (Percentile(), MeanSquaredError(), Entropy()):
        low, high = after(observer, torch.zeros(3, 4)).range()
        assert (low.item(), high.item()) == (0, 0)


def test_percentile():
    values = torch.randn(200, 500)
    values[0, 0] = 1000.0
    low, high = after(Percentile(0.999), values[:50], values[50:]).range()
    width = 2 * 1010 / BINS
    for end, share in ((low, 0.0005), (high, 0.9995)):
        assert abs(end - values.flatten().quantile(share)) <= width
    assert [t.item() for t in after(Percentile(1.0), values).range()] == [values.min(), 1000.0]
    with pytest.raises(ValueError, match="share"):
        Percentile(0.0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_mean_squared_error_finds_the_best_of_its_ranges(symmetric):
    values = torch.randn(300, 400) ** 3  # heavy tails
    low, high = after(MeanSquaredError(symmetric), *values.split(100)).range()
    absmax = values.abs().max()
    errors = {}
    for share in (1 - 0.02 * step for step in range(50)):
        ends = values.min().clamp(min=-share * absmax), values.max().clamp(max=share * absmax)
        errors[share] = (quantised(values, *ends, symmetric) - values).square().mean().item()
    found = (quantised(values, low, high, symmetric) - values).square().mean().item()
    assert high < 0.9 * values.max()
    assert found <= 1.01 * min(errors.values())
    assert found < 0.95 * errors[1.0]


def test_entropy_against_its_formula():
    """The KL divergence of a range, written out over bins and levels one by one."""
    values = torch.randn(100, 300)
    observer = after(Entropy(), values)
    low, high = torch.tensor(-2.0), torch.tensor(2.0)
    scale, zero = (t.item() for t in grid(low, high))
    counts, centres = observer.counts.tolist(), observer.centres.tolist()
    level = [round(c / scale) + zero for c in centres]
    inside = [i for i in range(BINS) if -128 <= level[i] <= 127]
    p = {i: counts[i] for i in inside}
    p[inside[0]] += sum(counts[: inside[0]])
    p[inside[-1]] += sum(counts[inside[-1] + 1 :])
    q = {}
    for code in range(-128, 128):
        members = [i for i in inside if level[i] == code]
        occupied = [i for i in members if p[i] > 0]
        for i in occupied:
            q[i] = sum(counts[j] for j in members) / len(occupied)
    total_p, total_q = sum(p.values()), sum(q.values())
    divergence = sum(
        p[i]
        / total_p
        * torch.tensor((p[i] / total_p) / max(q[i] / total_q, 1 / values.numel())).log()
        for i in q
    )
    assert observer.cost(low, high) == pytest.approx(divergence.item(), rel=1e-4)


def test_entropy_leaves_out_an_outlier():
    values = torch.randn(400, 500)
    values[0, 0] = 60.0
    low, high = after(Entropy(), values).range()
    assert high < 10
    assert high - low > 4


@pytest.mark.parametrize("observer", [MinMax, MovingAverage, Percentile, MeanSquaredError, Entropy])
def test_observers_are_statistics_of_calibrate(observer):
    model, data = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(64, 6)
    seen = trine.calibrate(model, data, observer)
    low, high = seen["2"].range()
    inputs = model[:2](data)
    assert low == 0
    assert 0 < high <= inputs.max()
