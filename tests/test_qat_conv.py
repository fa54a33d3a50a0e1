"""Convolutions that train under quantisation: the kernel's bits, and the gradients."""

import copy

import pytest
import torch
import trine
from linear_inputs import DTYPES, assert_same_bits
from torch import nn
from torch.nn import functional
from trine import Recipe
from trine.nn import Int8Conv2d, Int8Linear
from trine.quantize import QatConv2d, QatSchedule, prepare_qat

CHOICES = ("int8", "int8-static")
CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(6, 10, 3, padding=1),
    "strided": lambda: nn.Conv2d(6, 10, (3, 2), stride=2, bias=False),
    "grouped": lambda: nn.Conv2d(6, 9, 3, padding="same", groups=3, dilation=2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6),
}


def prepared(choice: str, kind: str = "plain", dtype=torch.float32) -> QatConv2d:
    conv, samples = CONVOLUTIONS[kind]().to(dtype), torch.randn(8, 6, 9, 9).to(dtype)
    return prepare_qat(nn.Sequential(conv), Recipe("float", conv=choice), samples)[0]


@pytest.mark.parametrize("choice", CHOICES)
class TestQatConv2d:
    @pytest.mark.parametrize("kind", CONVOLUTIONS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_eval_gives_the_bits_of_the_converted_layer(self, choice, kind, dtype):
        qat = prepared(choice, kind, dtype).eval()
        converted, x = trine.convert(qat), torch.randn(3, 6, 9, 9).to(dtype)
        assert isinstance(converted, Int8Conv2d)
        assert_same_bits(qat(x).detach(), converted(x))  # with autograd
        with torch.no_grad():
            assert_same_bits(qat(x), converted(x))
            assert_same_bits(qat(x[0]), converted(x)[0])
        # fp32: the sums below 2^24 are exact; 16 bits: to the last bit.
        error = (qat.train()(x).float() - converted(x).float()).norm() / converted(x).float().norm()
        assert error <= {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]

    @pytest.mark.parametrize("kind", CONVOLUTIONS)
    @pytest.mark.parametrize("training", [True, False])
    def test_straight_through_against_float64(self, choice, kind, training):
        qat = prepared(choice, kind).train(training)
        x = (1.3 * torch.randn(2, 6, 9, 9)).requires_grad_()
        y = qat(x)
        grad = torch.randn_like(y)
        y.backward(grad)

        wide = x.detach().double().requires_grad_()
        if choice == "int8":
            step = wide.detach().abs().amax((1, 2, 3), keepdim=True) / 127
            values = wide + ((wide / step).round() * step - wide).detach()
        else:
            scale, zero = (t.double() for t in qat.input_range.grid())
            steps = (wide / scale + zero).clamp(-128, 127)
            values = (steps + (steps.round() - steps).detach() - zero) * scale
        master = qat.weight.detach().double().requires_grad_()
        step = master.detach().abs().amax((1, 2, 3), keepdim=True) / 127
        weight = master + ((master / step).round() * step - master).detach()
        bias = None if qat.bias is None else qat.bias.detach().double().requires_grad_()
        expected = functional.conv2d(
            values, weight, bias, qat.stride, qat.pixels, qat.dilation, qat.groups
        )
        expected.backward(grad.double())
        pairs = [(y, expected), (x.grad, wide.grad), (qat.weight.grad, master.grad)]
        if bias is not None:
            pairs.append((qat.bias.grad, bias.grad))
        for actual, truth in pairs:
            assert (actual.double() - truth).norm() < 1e-5 * truth.norm()

    def test_nothing_stale(self, choice):
        qat, x = prepared(choice).eval(), torch.randn(2, 6, 9, 9)
        qat(x)
        for change in (
            lambda: qat.weight.data.mul_(-1.5),
            lambda: qat.load_state_dict(prepared(choice).state_dict()),
            lambda: [b.mul_(1.5) for b in qat.buffers()],
        ):
            change()
            assert_same_bits(qat(x).detach(), copy.deepcopy(qat).pack()(x))

    def test_a_network_trains_and_converts(self, choice, tmp_path):
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 2),
        )
        x = torch.randn(128, 1, 8, 8)
        labels = (x[:, 0, :4].mean((1, 2)) > x[:, 0, 4:].mean((1, 2))).long()
        qat = prepare_qat(model, Recipe(choice, conv=choice), x)
        optimizer, losses = torch.optim.Adam(qat.parameters(), 0.02), []
        schedule = QatSchedule(qat, freeze_ranges=30) if choice == "int8-static" else None
        for _ in range(60):
            loss = functional.cross_entropy(qat(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        small = trine.convert(qat.eval())
        assert isinstance(small[0], Int8Conv2d)
        assert isinstance(small[4], Int8Linear)
        assert_same_bits(small(x), qat(x).detach())
        trine.save(small, tmp_path / "small.safetensors")
        assert_same_bits(trine.load(tmp_path / "small.safetensors")(x), small(x))


def test_what_cannot_be_replaced_is_named():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding_mode="circular"), nn.Conv2d(2, 2, 3))
    qat = prepare_qat(model, Recipe("float", conv="int8"))
    assert [type(m) for m in qat] == [nn.Conv2d, QatConv2d]
    assert "padding_mode" in qat.qat_skipped["0"]


def test_errors():
    with pytest.raises(ValueError, match="choice is 'ternary'"):
        QatConv2d(2, 2, 3, choice="ternary")
    with pytest.raises(ValueError, match="conv is 'ternary'"):
        Recipe(conv="ternary")
    with pytest.raises(
        ValueError, match="'' is to be 'int8-static', whose scale is found from data"
    ):
        trine.compress(nn.Conv2d(2, 2, 3), Recipe(conv="int8-static"), torch.randn(1, 2, 5, 5))
    with pytest.raises(ValueError, match="give sample_inputs"):
        prepare_qat(nn.Conv2d(2, 2, 3), Recipe(conv="int8-static"))
    qat = prepared("int8")
    with pytest.raises(ValueError, match=r"expected \[batch, 6"):
        qat(torch.randn(1, 5, 9, 9))
    qat.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        trine.convert(qat)
