"""Convolutions as chains of smaller ones (Tucker, CP), and low rank with a 2:4 rest."""

import copy

import numpy as np
import pytest
import torch
import trine
from fake_timers import says
from torch import nn
from trine.calibration import SecondMoment
from trine.factorize import (
    Cp,
    Energy,
    Parameters,
    Rank,
    Speedup,
    Svd,
    SvdWithSparse24,
    Tucker,
    factorize,
)
from trine.factorize.tensors import cp_factors
from trine.nn import LowRankConv2d, Sparse24Linear


def float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def singular_values(weight: np.ndarray, mode: int) -> np.ndarray:
    return np.linalg.svd(np.moveaxis(weight, mode, 0).reshape(weight.shape[mode], -1))[1]


@pytest.mark.parametrize("ranks", [(3, 5), (6, 2), (8, 12)])
def test_tucker_is_within_the_bound_of_what_is_cut_off(ranks):
    layer = nn.Conv2d(8, 12, 3, padding=1)
    weight = float64(layer.weight)
    tails = [
        (singular_values(weight, mode)[rank:] ** 2).sum()
        for mode, rank in zip((1, 0), ranks, strict=True)
    ]
    plan = Tucker().plan("a", layer)
    built = plan.build(ranks)
    error = np.linalg.norm(weight - float64(built.weight)) ** 2
    assert max(tails) - 1e-9 <= error <= sum(tails) + 1e-9
    np.testing.assert_allclose(plan.error(built), (error / (weight**2).sum()) ** 0.5, atol=1e-6)
    shapes = [tuple(part.weight.shape) for part in built]
    assert shapes == [(ranks[0], 8, 1, 1), (ranks[1], ranks[0], 3, 3), (12, ranks[1], 1, 1)]
    assert sum(part.weight.numel() for part in built) == plan.size(ranks)


def test_tucker_finds_what_a_kernel_is_made_of():
    """A kernel of ranks (2, 3) comes back, and turns only improve what there is."""
    o, core, i = torch.randn(12, 3), torch.randn(3, 2, 3, 3), torch.randn(8, 2)
    layer = nn.Conv2d(8, 12, 3)
    layer.weight.data = torch.einsum("na,abij,cb->ncij", o, core, i)
    assert Tucker().plan("a", layer).error(Tucker().plan("a", layer).build((2, 3))) < 1e-6
    layer.weight.data += 0.5 * torch.randn(12, 8, 3, 3)
    errors = [
        (plan := Tucker(turns).plan("a", layer)).error(plan.build((2, 3))) for turns in (0, 1, 4)
    ]
    assert errors[0] > errors[1] >= errors[2] - 1e-9


def test_tuckers_path_goes_by_parameters_and_its_bound():
    weight = torch.randn(12, 8, 3, 3)
    layer = nn.Conv2d(8, 12, 3)
    layer.weight.data = weight
    plan = Tucker().plan("a", layer)
    assert (plan.ranks[0], plan.ranks[-1]) == ((1, 1), (8, 12))
    assert list(plan.parameters) == sorted(set(plan.parameters))
    assert list(plan.losses) == sorted(plan.losses, reverse=True)
    for rank, loss in zip(plan.ranks, plan.losses, strict=True):
        assert plan.error(plan.build(rank)) ** 2 <= loss + 1e-6
    small = factorize(nn.Sequential(layer), Energy(0.7), Tucker())
    assert small.report.layers[0].error ** 2 <= 0.3
    small = factorize(nn.Sequential(layer, copy.deepcopy(layer)), Parameters(0.5), Tucker())
    assert sum(p.numel() for p in small.parameters()) - 24 <= 0.5 * 2 * weight.numel()


def unfolded_products(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The Khatri-Rao product of three factors, column by column."""
    return np.stack(
        [np.kron(np.kron(a[:, r], b[:, r]), c[:, r]) for r in range(a.shape[1])], axis=1
    )


def test_cp_rests_where_no_factor_can_be_improved():
    """At the end each factor is the least-squares solution for the others."""
    weight = torch.randn(6, 5, 3, 3)
    found = [float64(f) for f in cp_factors(weight, 4, 2000)]
    product = np.einsum("nr,cr,ir,jr->ncij", *found)
    error = np.linalg.norm(float64(weight) - product)
    for mode in range(4):
        others = [f for at, f in enumerate(found) if at != mode]
        unfolded = np.moveaxis(float64(weight), mode, 0).reshape(weight.shape[mode], -1)
        basis = unfolded_products(*others)
        residual = np.linalg.lstsq(basis, unfolded.T, rcond=None)[0].T @ basis.T - unfolded
        assert error >= np.linalg.norm(residual) - 1e-9
        np.testing.assert_allclose(error, np.linalg.norm(residual), rtol=1e-3)
    norms = [np.linalg.norm(f, axis=0) for f in found]
    np.testing.assert_allclose(norms, np.broadcast_to(norms[0], (4, 4)))


def test_cp_finds_what_a_kernel_is_made_of():
    parts = [torch.randn(d, 3) for d in (8, 6, 3, 3)]
    layer = nn.Conv2d(6, 8, 3)
    layer.weight.data = torch.einsum("nr,cr,ir,jr->ncij", *parts)
    plan = Cp().plan("a", layer)
    assert plan.error(plan.build(3)) < 1e-3
    assert plan.error(plan.build(2)) > plan.error(plan.build(3))
    assert plan.size(3) == 3 * (8 + 6 + 3 + 3)


@pytest.mark.parametrize("method", [Tucker(), Cp(), Svd()], ids=lambda m: m.name)
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": (1, 2)},
        {"dilation": 2, "padding": "same"},
        {"padding": 1, "padding_mode": "circular"},
        {"bias": False},
    ],
    ids=str,
)
def test_the_chain_is_the_convolution_of_its_kernel(tmp_path, method, options):
    layer = nn.Conv2d(6, 16, (3, 5), **options)
    model, x = nn.Sequential(layer), torch.randn(2, 6, 9, 8)
    small = factorize(model, Rank((3, 4) if method.name == "tucker" else 4), method)
    assert isinstance(small[0], LowRankConv2d)
    as_one = copy.deepcopy(layer)
    as_one.weight.data = small[0].weight.detach()
    torch.testing.assert_close(small(x), as_one(x), rtol=1e-4, atol=1e-5)
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    trine.save(small, tmp_path / "a.trine")
    again = trine.load(tmp_path / "a.trine")
    assert torch.equal(again(x), small(x))


def test_ranks_that_a_convolution_does_not_have():
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    for method, rank, message in [
        (Tucker(), 3, r"rank 3 is not a pair \(inputs, outputs\)"),
        (Tucker(), (5, 3), "rank 5 is not a whole number from 1 to 4"),
        (Tucker(), (4, 0), "rank 0 is not a whole number from 1 to 6"),
        (Cp(), 99, "rank 99 is not a whole number from 1 to 13"),
    ]:
        with pytest.raises(ValueError, match=f"layer '0': {message}"):
            factorize(model, Rank(rank), method)
    for ranks in (Energy(0.9), Parameters(0.5)):
        with pytest.raises(ValueError, match="cannot for layer '0'; give a Rank"):
            factorize(model, ranks, Cp())


# ---- low rank and a 2:4 rest ----


def test_low_rank_and_rest_are_each_the_best_for_the_other():
    layer = nn.Linear(22, 16)
    model, weight = nn.Sequential(layer), float64(layer.weight)
    small = factorize(model, Rank(3), SvdWithSparse24(turns=20))
    assert isinstance(small[0].residual, Sparse24Linear)
    rest = float64(small[0].residual.dense_weight())
    low = float64(small[0].second.weight) @ float64(small[0].first.weight)
    for start in range(0, 22, 4):
        assert ((rest[:, start : start + 4] != 0).sum(1) <= 2).all()
    error = np.linalg.norm(weight - low - rest)
    np.testing.assert_allclose(
        small.report.layers[0].error, error / np.linalg.norm(weight), rtol=1e-5
    )
    # No other two of four would be better for this low rank, and hardly another low rank.
    left = weight - low
    best = sum(
        (np.sort(np.abs(left[:, s : s + 4]), axis=1)[:, :-2] ** 2).sum() for s in range(0, 22, 4)
    )
    np.testing.assert_allclose(error**2, best, rtol=1e-5)
    tail = np.linalg.svd(weight - rest, compute_uv=False)[3:]
    assert error**2 >= (tail**2).sum() - 1e-9
    np.testing.assert_allclose(error**2, (tail**2).sum(), rtol=0.05)


def test_turns_only_improve_and_beat_either_part_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32))
    errors = [
        factorize(model, Rank(4), SvdWithSparse24(turns=n)).report.layers[0].error
        for n in (1, 2, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1]
    weight = model[0].weight.detach()
    sparse = Sparse24Linear.from_linear(model[0]).dense_weight()
    assert errors[-1] < (weight - sparse).norm() / weight.norm()
    assert errors[-1] < factorize(model, Rank(4)).report.layers[0].error


def test_the_calibrated_rest_counts_in_the_outputs():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 24)), torch.randn(300, 32) * torch.logspace(0, -2, 32)
    moments = trine.calibrate(model, x, SecondMoment)
    errors = [
        (factorize(model, Rank(2), method)(x) - model(x)).norm()
        for method in (SvdWithSparse24(moments), SvdWithSparse24())
    ]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("choice", [None, "int8"])
def test_low_rank_and_rest_train_and_are_saved(tmp_path, choice):
    model, x = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8)), torch.randn(5, 24)
    small = factorize(model, Rank(2), SvdWithSparse24(turns=2))
    small(x).sum().backward()
    assert small[0].first.weight.grad is not None
    assert small[0].residual.bias is None
    if choice:
        small = trine.compress(small, trine.Recipe(choice), x, timer=says(2))
        assert small.report.swapped == 4
    trine.save(small, tmp_path / "a.trine")
    again = trine.load(tmp_path / "a.trine")
    assert torch.equal(again(x), small(x))
    assert isinstance(again[2].residual, Sparse24Linear)


def test_the_rest_is_for_ranks_and_speed():
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(5, 64)
    with pytest.raises(ValueError, match="cannot for layer '0'; give a Rank"):
        factorize(model, Energy(0.9), SvdWithSparse24())
    small = factorize(
        model, Speedup(1.5, 4), SvdWithSparse24(turns=1), sample_inputs=x, timer=says2
    )
    assert small[0].rank == 12  # 16 * 128 would be half of the weights, and the rest is the other
    with pytest.raises(ValueError, match="turns is 0"):
        SvdWithSparse24(turns=0)


def says2(calls):
    return {name: 1.0 if name == "float" else 0.5 for name in calls}
