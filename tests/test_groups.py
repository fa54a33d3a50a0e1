"""Choices with a group size: what they are made into, everywhere that a recipe is taken."""

import numpy as np
import pytest
import torch
import trine
from fake_timers import says
from linear_inputs import DTYPES, assert_same_bits
from torch import nn
from trine import Recipe
from trine.nn import TernaryLinear
from trine.quantize import QatLinear, gptq, post_training, prepare_qat, ste_bias
from trine.quantize.groups import split_group
from trine.quantize.weights import weight_rule

CHOICES = ("ternary-g64", "ternary-twn-g128", "int8-weight-g128")


def by_hand(choice: str, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of float64 weights, one group after the other."""
    base, size = choice.rsplit("-g", 1)
    codes, scales = np.zeros_like(weight), np.zeros((len(weight), weight.shape[1] // int(size)))
    for row, group in np.ndindex(scales.shape):
        columns = slice(group * int(size), (group + 1) * int(size))
        part = weight[row, columns]
        if base == "int8-weight":
            scale = np.abs(part).max() / 127
            codes[row, columns] = np.round(part / scale)
        elif base == "ternary":
            scale = np.mean(np.abs(part))
            codes[row, columns] = np.clip(np.round(part / scale), -1, 1)
        else:
            beyond = np.abs(part) > 0.7 * np.mean(np.abs(part))
            scale = np.mean(np.abs(part[beyond]))
            codes[row, columns] = np.sign(part) * beyond
        scales[row, group] = scale
    return codes, scales


def spread(n: int, k: int) -> torch.Tensor:
    """A weight whose columns differ in size, as it takes for groups to matter."""
    return torch.randn(n, k) * torch.linspace(0.1, 3, k)


@pytest.mark.parametrize("choice", CHOICES)
def test_each_group_has_its_own_levels_against_float64(choice):
    weight = spread(7, 256)
    codes, scale = weight_rule(choice)(weight)
    expected_codes, expected_scale = by_hand(choice, weight.double().numpy())
    assert np.array_equal(codes.double().numpy(), expected_codes)
    np.testing.assert_allclose(scale.double().numpy(), expected_scale, rtol=1e-6)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            "ternary-g100",
            "groups of 100 columns; a group is a multiple of 64, as in 'ternary-g128'",
        ),
        ("ternary-g0", "groups of 0 columns; a group is a multiple of 64"),
        ("sparse24-g64", "'sparse24' no form with a scale for each group"),
        ("ternary-gx", "it must be one of"),
        ("int4-g64", "'int4' no form with"),
    ],
)
def test_a_wrong_group_size_is_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        Recipe({"*.up": choice})


def test_a_group_size_is_split_off():
    assert split_group("ternary-twn-g192") == ("ternary-twn", 192)
    assert split_group("ternary-twn") == ("ternary-twn", None)
    assert Recipe("ternary-g64").choice("a") == "ternary-g64"


def network() -> nn.Sequential:
    layers = nn.Linear(192, 128), nn.ReLU(), nn.Linear(128, 100), nn.Linear(100, 3)
    with torch.no_grad():
        for layer in (layers[0], layers[2]):
            layer.weight.copy_(spread(*layer.weight.shape) / 10)
    return nn.Sequential(*layers)


def test_compress_reports_a_layer_that_groups_do_not_divide(tmp_path):
    model, x = network(), torch.randn(4, 192)
    small = trine.compress(model, Recipe("ternary-g64"), x, timer=says(2.0))
    rows = {row.name: row for row in small.report.layers}
    assert [small[i].granularity for i in (0, 2)] == [64, 64]
    assert type(small[3]) is nn.Linear
    assert rows["3"].reason == "groups of 64 columns do not divide its 100 input features"
    trine.save(small, tmp_path / "small.trine")
    assert_same_bits(trine.load(tmp_path / "small.trine")(x), small(x))


@pytest.mark.parametrize("make", [prepare_qat, post_training])
def test_where_a_layer_must_fit_the_error_names_it(make):
    model, x = network(), torch.randn(4, 192)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"layer '2' .* groups of 192 columns do not divide its 128"
    ):
        make(model, Recipe("ternary-g192"), x)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="do not divide its 100 input features"):
        QatLinear(100, 4, choice="ternary-g64")
    with pytest.raises(ValueError, match="a multiple of 64 that divides in_features = 100"):
        TernaryLinear.from_linear(nn.Linear(100, 4), group=64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", CHOICES)
def test_in_training_and_after_it(choice, dtype):
    linear, x = nn.Linear(384, 9).to(dtype), torch.randn(5, 384).to(dtype)
    with torch.no_grad():
        linear.weight.copy_(spread(9, 384))
    qat = prepare_qat(linear, Recipe(choice))
    in_training = qat(x)
    converted = trine.convert(qat.eval())
    assert converted.granularity == split_group(choice)[1]
    assert_same_bits(qat(x).detach(), converted(x))
    if choice.startswith("ternary"):  # sums of integers, in the kernel's order
        assert_same_bits(in_training.detach(), converted(x))
    else:
        error = (in_training - converted(x)).float().norm()
        assert error <= max(1e-5, torch.finfo(dtype).eps) * converted(x).float().norm()


@pytest.mark.parametrize("choice", CHOICES)
def test_the_gradient_passes_straight_through_against_float64(choice):
    qat = prepare_qat(nn.Linear(256, 6), Recipe(choice))
    x, grad_y = torch.randn(8, 256, requires_grad=True), torch.randn(8, 6)
    qat(x).backward(grad_y)
    codes, scale = by_hand(choice, qat.weight.detach().double().numpy())
    dense = torch.from_numpy(codes * scale.repeat(split_group(choice)[1], 1))
    rows = x.detach().double()
    if choice.startswith("ternary"):
        step = rows.abs().amax(1, keepdim=True) / 127
        rows = (rows / step).round() * step
    for found, expected in (
        (x.grad, grad_y.double() @ dense),
        (qat.weight.grad, grad_y.double().T @ rows),
    ):
        assert (found - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize(("choice", "largest"), [("ternary-g64", 1), ("int8-weight-g64", 127)])
def test_after_training_by_gptq_against_inverses_taken_anew(choice, largest):
    weight = spread(5, 128)
    x = torch.randn(600, 128).double() @ (torch.eye(128) + 0.3 * torch.randn(128, 128)).double()
    gram = x.T @ x
    codes, scale = gptq(choice, weight, gram)
    steps = np.repeat(by_hand(choice, weight.double().numpy())[1], 64, 1)

    damped = gram.numpy() + 0.01 * gram.diagonal().mean().item() * np.eye(128)
    left, current, expected = [], weight.double().numpy().copy(), np.zeros((5, 128))
    left = list(np.argsort(-np.diag(gram.numpy()), kind="stable"))
    while left:
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        j = left[0]
        expected[:, j] = np.clip(np.round(current[:, j] / steps[:, j]), -largest, largest)
        error = (current[:, j] - expected[:, j] * steps[:, j]) / inverse[0, 0]
        current[:, left] -= error[:, None] * inverse[0]
        left.pop(0)
    assert (codes.double().numpy() == expected).mean() > 0.98  # a tie may fall either way
    np.testing.assert_allclose(scale.numpy(), steps[:, ::64], rtol=1e-6)


@pytest.mark.parametrize("choice", ["ternary", "int8-weight"])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_post_training_packs_groups(rounding, choice):
    model, x = network(), torch.randn(300, 192)
    how = {"rounding": rounding, "correct_bias": True}
    recipe = Recipe({"3": "float", "*": f"{choice}-g64"})
    small = post_training(model, recipe, x, **how)
    coarse = post_training(model, Recipe({"3": "float", "*": choice}), x, **how)
    assert small[0].weight_scale.shape == (128, 3)
    errors = [(made(x) - model(x)).norm() for made in (small, coarse)]
    assert errors[0] < errors[1]


def test_the_bias_of_its_straight_through_gradient():
    (found,) = ste_bias(
        lambda w: w.square().mean(), torch.randn(3, 128), "ternary-g64", spreads=(0.5,), samples=3
    )
    assert np.isfinite(found.bias)
