"""Weights of terms, and schedules."""

import pytest
import torch
from torch import nn
from trine.distill import balance as b
from trine.distill import schedules


def terms_of(weight: torch.Tensor):
    return {"a": weight.square().sum(), "b": 30 * weight.abs().sum(), "c": weight.sum() / 100}


def test_fixed_and_scheduled():
    terms = {"hard": torch.tensor(2.0), "soft": torch.tensor(3.0)}
    balance = b.Fixed({"hard": schedules.linear(1, 0, 10), "soft": 0.5})
    assert [balance(terms, step).item() for step in (0, 5, 10, 99)] == [3.5, 2.5, 1.5, 1.5]
    assert balance.weights == {"hard": 0, "soft": 0.5}


def test_a_term_of_weight_0_is_left_out():
    terms = {"a": torch.tensor(2.0), "b": torch.tensor(torch.inf)}
    assert b.Fixed({"a": 1, "b": 0})(terms) == 2
    with pytest.raises(ValueError, match="all weights are 0"):
        b.Fixed({"a": 0, "b": 0})(terms)


@pytest.mark.parametrize("make", [b.Fixed, lambda weights: b.Uncertainty(list(weights))])
def test_misspelt_names(make):
    terms = {"a": torch.tensor(2.0), "b": torch.tensor(1.0)}
    with pytest.raises(ValueError, match="the term 'b' has no weight"):
        make({"a": 1})(terms)
    with pytest.raises(ValueError, match="the weight of 'd' has no term"):
        make({"a": 1, "b": 1, "d": 1})(terms)


def test_gradient_norms_become_equal():
    weight = nn.Parameter(torch.randn(4, 3))
    balance = b.GradientNorm([weight], {"c": 0.5}, every=10)
    terms = terms_of(weight)
    total = balance(terms, 0)
    plain = {
        k: torch.autograd.grad(v, weight, retain_graph=True)[0].norm() for k, v in terms.items()
    }
    mean = sum(plain.values()) / 3
    for name, share in {"a": 1, "b": 1, "c": 0.5}.items():
        torch.testing.assert_close(balance.weights[name] * plain[name], share * mean)
    torch.testing.assert_close(total, sum(balance.weights[k] * v for k, v in terms.items()))
    total.backward()  # the graph is still there
    first = dict(balance.weights)
    with torch.no_grad():
        weight *= 2
    balance(terms_of(weight), 9)
    assert balance.weights == first
    balance(terms_of(weight), 10)
    assert balance.weights != first


def test_gradient_norm_of_a_term_without_gradient():
    weight = nn.Parameter(torch.randn(4))
    balance = b.GradientNorm([weight])
    total = balance({"a": weight.square().sum(), "constant": torch.tensor(7.0)})
    assert balance.weights["constant"] == 1
    assert total.isfinite()


def test_gradient_norm_is_saved():
    weight = nn.Parameter(torch.randn(4, 3))
    balance, again = b.GradientNorm([weight]), b.GradientNorm([weight])
    balance(terms_of(weight), 0)
    again.load_state_dict(balance.state_dict())
    assert again(terms_of(weight), 1) == balance(terms_of(weight), 1)


def test_uncertainty():
    balance = b.Uncertainty(["a", "b"])
    with torch.no_grad():
        balance.log_variances["a"].fill_(0.7)
    terms = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}
    s = torch.tensor(0.7).double()
    torch.testing.assert_close(balance(terms).double(), torch.exp(-s) / 2 * 2 + s / 2 + 1.5)
    # At its best s_i = log term_i: there both terms count one half.
    optimizer = torch.optim.SGD(balance.parameters(), 0.5)
    for _ in range(200):
        optimizer.zero_grad()
        balance(terms).backward()
        optimizer.step()
    learned = [balance.log_variances[k].exp() for k in "ab"]
    torch.testing.assert_close(torch.stack(learned), torch.tensor([2.0, 3.0]))


def test_class_balanced_weights():
    labels = torch.tensor([0, 0, 0, 2, 2, 0, -100])
    weights = b.class_balanced_weights(labels, 4)
    torch.testing.assert_close(weights, torch.tensor([6 / 8, 0, 6 / 4, 0]))
    torch.testing.assert_close(weights[labels[:6]].mean(), torch.tensor(1.0))


def test_schedules():
    linear = schedules.linear(1.0, 3.0, 4, after=2)
    assert [linear(i) for i in (0, 2, 3, 6, 9)] == [1, 1, 1.5, 3, 3]
    cosine = schedules.cosine(1.0, 3.0, 4)
    assert [cosine(i) for i in (0, 2, 4, 9)] == pytest.approx([1, 2, 3, 3])
    steps = schedules.piecewise([8.0, 4.0, 1.0], [10, 20])
    assert [steps(i) for i in (0, 9, 10, 19, 20)] == [8, 8, 4, 4, 1]
    assert schedules.constant(2.0)(5) == 2
    with pytest.raises(ValueError, match="one value more"):
        schedules.piecewise([1.0], [10])


def test_temperature_for_batch_keeps_the_noise():
    """Of the gradient without T^2: its spread times T^2 sqrt(B) is the same."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1 << 15, 10, dtype=torch.float64)

    def noise(temperature: float, batch: int) -> float:
        gradients = (
            (student / temperature).softmax(1) - (teacher / temperature).softmax(1)
        ) / temperature
        return gradients.reshape(-1, batch, 10).mean(1).std(0).norm().item()

    other = schedules.temperature_for_batch(20.0, 16, 64)
    assert other == pytest.approx(20 / 2**0.5)
    assert noise(other, 64) == pytest.approx(noise(20.0, 16), rel=0.05)
