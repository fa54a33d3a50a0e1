"""Schemes that learn more than the weight: TTQ, LSQ, and ranges of activations."""

import copy

import pytest
import torch
import trine
from linear_inputs import assert_same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from trine import nn as packed_nn
from trine.quantize import QatLinear, QatSchedule, prepare_qat
from trine.quantize.input_range import MOMENTUM
from trine.quantize.schemes import SCHEMES

LEARNED = [choice for choice, scheme in SCHEMES.items() if scheme.names or scheme.static_input]


def prepared(choice: str, k: int = 37, n: int = 5, scale: float = 1.0) -> QatLinear:
    return prepare_qat(nn.Linear(k, n), trine.Recipe(linear=choice), scale * torch.randn(64, k))


def rounded(t: Tensor) -> Tensor:
    """rint with the gradient of the identity."""
    return t + (t.round() - t).detach()


def int8_rows(x: Tensor) -> Tensor:
    step = x.abs().amax(1, keepdim=True).detach() / 127
    return rounded(x / step) * step


def assert_close(actual: Tensor, expected: Tensor) -> None:
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < 1e-5


@pytest.mark.parametrize("training", [True, False])
def test_lsq_against_autograd_in_float64(training):
    qat = prepared("int8-lsq").train(training)
    with torch.no_grad():
        qat.weight_scale.mul_(0.05)  # some weights and activations are clamped then
        qat.input_scale.mul_(0.05)
    x = torch.randn(8, 37, requires_grad=True)
    grad_y = torch.randn(8, 5)
    y = qat(x)
    y.backward(grad_y)

    wide, w, s, a = (
        t.detach().double().requires_grad_()
        for t in (x, qat.weight, qat.weight_scale, qat.input_scale)
    )

    def damped(t: Tensor, values: int) -> Tensor:
        g = 1 / (values * 127) ** 0.5
        return t * g + (t * (1 - g)).detach()

    rows, steps = damped(a, x.numel()), damped(s, 37)[:, None]
    x_q = rounded((wide / rows).clamp(-128, 127)) * rows
    w_q = rounded((w / steps).clamp(-127, 127)) * steps
    expected = x_q @ w_q.T + qat.bias.detach().double()
    expected.backward(grad_y.double())
    assert (wide.grad == 0).any()
    assert (w.grad == 0).any()
    assert_close(y.detach(), expected.detach())
    for actual, truth in ((x, wide), (qat.weight, w), (qat.weight_scale, s), (qat.input_scale, a)):
        assert_close(actual.grad, truth.grad)


@pytest.mark.parametrize("training", [True, False])
def test_ttq_against_float64(training):
    qat = prepared("ternary-ttq").train(training)
    with torch.no_grad():
        qat.sign_scale.copy_(torch.tensor([0.3, 0.1]))
    x = torch.randn(8, 37, requires_grad=True)
    grad_y = torch.randn(8, 5)
    y = qat(x)
    y.backward(grad_y)

    wide = x.detach().double().requires_grad_()
    weight = qat.weight.detach().double()
    ends = torch.tensor([0.3, 0.1]).double().requires_grad_()  # as fp32 rounds them
    beyond = 0.05 * weight.abs().max()
    above, below = weight > beyond, weight < -beyond
    w_q = ends[0] * above - ends[1] * below
    w_q.retain_grad()
    expected = int8_rows(wide) @ w_q.T + qat.bias.detach().double()
    expected.backward(grad_y.double())
    assert (~above & ~below).any()
    assert_close(y.detach(), expected.detach())
    assert_close(x.grad, wide.grad)
    assert_close(qat.sign_scale.grad, ends.grad)
    # As published: the gradient of the quantised weight times p, n or 1.
    factor = torch.where(above, 0.3, torch.where(below, 0.1, 1.0))
    assert_close(qat.weight.grad, factor * w_q.grad)


@pytest.mark.parametrize("training", [True, False])
def test_static_input_against_float64(training):
    qat = prepared("int8-static", scale=0.5).train(training)
    x = 2 * torch.randn(8, 37) + 0.5
    x.requires_grad_()
    grad_y = torch.randn(8, 5)
    y = qat(x)
    y.backward(grad_y)

    low, high = qat.input_range.low.double(), qat.input_range.high.double()
    scale = ((high - low) / 255).float().double()
    zero = (-low / scale).round() - 128
    wide = x.detach().double().requires_grad_()
    x_q = (rounded((wide / scale + zero).clamp(-128, 127)) - zero) * scale
    weight = qat.weight.detach().double().requires_grad_()
    expected = x_q @ int8_rows(weight).T + qat.bias.detach().double()
    expected.backward(grad_y.double())
    assert (wide.grad == 0).any()
    assert_close(y.detach(), expected.detach())
    assert_close(x.grad, wide.grad)
    assert_close(qat.weight.grad, weight.grad)


def test_where_they_begin():
    linear, samples = nn.Linear(37, 5), torch.randn(64, 37)
    lsq = prepare_qat(linear, trine.Recipe(linear="int8-lsq"), samples)
    weight = linear.weight.detach()
    torch.testing.assert_close(lsq.weight_scale.detach(), 2 * weight.abs().mean(1) / 127**0.5)
    torch.testing.assert_close(lsq.input_scale.item(), 2 * samples.abs().mean().item() / 127**0.5)
    ttq = prepare_qat(linear, trine.Recipe(linear="ternary-ttq"))
    beyond = weight.abs() > 0.05 * weight.abs().max()
    ends = [weight[beyond & (weight > 0)].mean(), -weight[beyond & (weight < 0)].mean()]
    torch.testing.assert_close(ttq.sign_scale.detach(), torch.stack(ends))
    static = prepare_qat(linear, trine.Recipe(linear="int8-static"), samples)
    ends = [static.input_range.low.item(), static.input_range.high.item()]
    assert ends == [samples.min().item(), samples.max().item()]


@pytest.mark.parametrize("choice", LEARNED)
class TestNothingStale:
    """Whatever changes the state in evaluation mode, the next call sees it."""

    @pytest.mark.parametrize(
        "change",
        [
            lambda qat: torch.optim.SGD(qat.parameters(), lr=1e-3).step(),
            lambda qat: qat.load_state_dict(prepared(qat.choice, scale=3.0).state_dict()),
            lambda qat: qat.weight.data.mul_(-1),
            lambda qat: [p.data.mul_(1.5) for p in qat.parameters()],
            lambda qat: [b.mul_(1.5) for b in qat.buffers()],
            lambda qat: qat.bfloat16().float(),
        ],
    )
    def test_after(self, choice, change):
        qat, x = prepared(choice).eval(), torch.randn(3, 37)
        qat(x).sum().backward()
        change(qat)
        expected = copy.deepcopy(qat).pack()(x)
        assert_same_bits(qat(x).detach(), expected)
        assert_same_bits(trine.convert(qat)(x), expected)


@pytest.mark.parametrize("choice", LEARNED)
def test_saved_and_loaded(choice, tmp_path):
    qat, x = prepared(choice).eval(), torch.randn(3, 37)
    trine.save(trine.convert(nn.Sequential(qat)), tmp_path / "m.safetensors")
    assert_same_bits(trine.load(tmp_path / "m.safetensors")(x), qat(x).detach())


@pytest.mark.parametrize("choice", LEARNED)
def test_what_is_learned_is_trained(choice):
    qat = prepared(choice)
    before = {name: p.detach().clone() for name, p in qat.named_parameters()}
    optimizer = torch.optim.Adam(qat.parameters(), lr=1e-4)
    qat(torch.randn(16, 37)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in qat.named_parameters())


def test_ranges_are_followed_and_frozen():
    qat, low = prepared("int8-static"), []
    qat.input_range.begin(torch.tensor(-1.0), torch.tensor(1.0))
    schedule = QatSchedule(qat, freeze_ranges=2)
    for end in (-3.0, -5.0, -7.0):
        x = torch.zeros(2, 37)
        x[0, 0], x[1, 1] = end, 1.0
        before = qat.input_range.grid()[0].clone()
        qat(x)
        assert torch.equal(qat.input_range.grid()[0], before)  # until the update
        schedule.step()
        low.append(qat.input_range.low.item())
    first = MOMENTUM * -1 + (1 - MOMENTUM) * -3
    second = MOMENTUM * first + (1 - MOMENTUM) * -5
    assert low == pytest.approx([first, second, second])
    again = QatSchedule(copy.deepcopy(qat), freeze_ranges=2)
    assert not again.ranges[0].frozen
    again.load_state_dict(schedule.state_dict())
    assert again.ranges[0].frozen


def test_in_evaluation_nothing_is_watched():
    qat = prepared("int8-static").eval()
    qat(1e6 * torch.randn(2, 37))
    QatSchedule(qat).step()
    assert qat.input_range.high.item() < 100


def test_checkpointing_does_not_count_twice():
    x = torch.randn(4, 37)
    plain, again = (prepared("int8-static") for _ in range(2))
    again.load_state_dict(plain.state_dict())
    plain(x).sum().backward()
    checkpoint(again, x, use_reentrant=False).sum().backward()
    for layer in (plain, again):
        QatSchedule(layer).step()
    assert_same_bits(plain.weight.grad, again.weight.grad)
    assert torch.equal(plain.input_range.low, again.input_range.low)


def test_two_scale_layer_by_hand():
    codes = torch.tensor([[1, -1, 0], [0, 1, 1]], dtype=torch.int8)
    layer = packed_nn.TwoScaleTernaryLinear.from_codes(codes, torch.tensor([2.0, 0.5]))
    assert layer.dense_weight().tolist() == [[2.5, -1.5, 0.0], [0.0, 2.5, 2.5]]
    x = torch.tensor([[127.0, 1.0, 2.0]], requires_grad=True)
    y = layer(x)
    assert y.tolist() == [[2.5 * 127 - 1.5, 2.5 + 5.0]]
    y.sum().backward()
    assert x.grad.tolist() == [[2.5, 1.0, 2.5]]
    with pytest.raises(ValueError, match=r"weight_scale \[2\]"):
        packed_nn.TwoScaleTernaryLinear.from_codes(codes, torch.ones(1))


def test_errors():
    with pytest.raises(ValueError, match=r"layer '0' gets one scale.*give sample_inputs"):
        prepare_qat(nn.Sequential(nn.Linear(4, 4)), trine.Recipe(linear="int8-lsq"))
    with pytest.raises(ValueError, match=r"'int8-lsq' is not one of .* trained in float"):
        trine.compress(
            nn.Linear(64, 64), trine.Recipe(linear="int8-lsq", prefer="size"), torch.randn(2, 64)
        )
    with pytest.raises(ValueError, match="set it with prepare_qat"):
        QatLinear(4, 4, choice="int8-static").eval()(torch.randn(2, 4))
    with pytest.raises(ValueError, match="no layer whose activations have a range"):
        QatSchedule(nn.Linear(4, 4))
    for choice, name in (("int8-lsq", "weight_scale"), ("ternary-ttq", "sign_scale")):
        qat = prepared(choice)
        getattr(qat, name).data[0] = torch.nan
        with pytest.raises(ValueError, match=f"{name} holds NaN"):
            trine.convert(qat)
