"""The straight-through gradient against the expected loss, where that is known in closed form."""

import math

import pytest
import torch
from trine.quantize import draw_ste_bias, ste_bias


def test_a_sign_has_a_known_bias():
    """Q = sign, loss = sum a q: E loss = sum a (2 Phi(w / s) - 1), straight through sum a d."""
    weight, a = torch.tensor([0.5, -1.0, 1.5]), torch.tensor([1.0, -2.0, 0.5])
    (found,) = ste_bias(
        lambda q: (a * q).sum(), weight, torch.sign, spreads=[1.0], directions=6, samples=500
    )
    # mean |w| is 1, so s = 1; the central difference over h = 1/2 is a difference of Phi.
    phi = lambda x: 0.5 * (1 + math.erf(x / 2**0.5))  # noqa: E731
    expected = [
        sum(
            ai * di * 2 * (phi(wi + 0.5) - phi(wi - 0.5))
            for ai, di, wi in zip(a.tolist(), d, weight.tolist(), strict=True)
        )
        for d in _directions(6)
    ]
    straight = [sum(ai * di for ai, di in zip(a.tolist(), d, strict=True)) for d in _directions(6)]
    assert found.straight_through.tolist() == pytest.approx(straight)
    errors = (found.expected - torch.tensor(expected)).abs()
    assert (errors < 5 * found.standard_error).all()
    assert found.bias > 5 * found.noise


def _directions(count: int) -> list[list[float]]:
    """Those that are drawn: seen through a linear loss of one weight each."""
    found = []
    for axis in torch.eye(3):
        (result,) = ste_bias(
            lambda q, axis=axis: (axis * q).sum(),
            torch.tensor([0.5, -1.0, 1.5]),
            lambda w: w,
            spreads=[1.0],
            directions=count,
            samples=500,
        )
        found.append(result.straight_through.tolist())
    return [list(d) for d in zip(*found, strict=True)]


def test_dither_of_one_step_has_no_bias():
    """E round(w + u) = w for u uniform over a step: a linear loss then has the very gradient."""
    weight = torch.full((4, 4), 1.0) + torch.rand(4, 4).sub(0.5) * 0.5
    unit = 1 / weight.abs().mean().item()  # the noise's spread is one step of the grid
    a = torch.randn(4, 4)
    (found,) = ste_bias(
        lambda q: (a * q).sum(),
        weight,
        torch.round,
        spreads=[unit],
        noise="uniform",
        directions=4,
        samples=50,
    )
    assert found.bias < 1e-6
    assert found.cosine > 0.9


@pytest.mark.parametrize("choice", ["ternary", "int8"])
def test_of_a_layer_and_its_picture(choice, tmp_path):
    x, y = torch.randn(32, 12), torch.randn(32, 3)
    results = ste_bias(
        lambda w: (x @ w.T - y).square().mean(),
        torch.randn(3, 12) / 3,
        choice,
        spreads=(0.1, 0.5),
        directions=3,
        samples=30,
    )
    assert [r.spread for r in results] == [0.1, 0.5]
    assert all(math.isfinite(r.bias) for r in results)
    draw_ste_bias(results, tmp_path / "bias.png")
    assert (tmp_path / "bias.png").stat().st_size > 1000
    again = ste_bias(
        lambda w: (x @ w.T - y).square().mean(),
        torch.ones(3, 12),
        choice,
        spreads=(0.1,),
        samples=2,
    )
    assert len(again) == 1


def test_errors():
    weight = torch.ones(2, 2)
    for match, how in (
        ("'int4' is not one of", {"quantise": "int4"}),
        ("noise is 'pink'", {"noise": "pink"}),
        ("spreads above 0", {"spreads": [0.0]}),
        ("NaN", {"weight": weight * torch.nan}),
        ("must be one value", {"loss": lambda w: w}),
    ):
        given = {"loss": torch.sum, "weight": weight, "quantise": "ternary", "samples": 2, **how}
        with pytest.raises(ValueError, match=match):
            ste_bias(**given)
