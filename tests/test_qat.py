"""Training under quantisation: the kernel's arithmetic, its bits, and its gradients."""

import copy
import itertools
import pickle

import pytest
import torch
import trine
from linear_inputs import DTYPES, assert_same_bits, difficult_rows
from torch import Tensor, nn
from trine import nn as packed_nn
from trine.ops.quantize_rows import reference
from trine.quantize import QatLinear, int8_absmax, prepare_qat, ternary_absmean, two_of_four
from trine.quantize.schemes import SCHEMES
from trine.quantize.weights import FLOAT_INPUT, ternary24_absmean, ternary_twn

CHOICES = list(packed_nn._CHOICES)
ALL = list(SCHEMES)  # with those that learn more than a weight: test_qat_learned.py has the rest
SHAPES = ((1, 1, 1), (3, 5, 37), (2, 17, 64), (9, 16, 130))  # (M, N, K)


def prepared(choice: str, k: int = 37, n: int = 5, bias: bool = True, dtype=torch.float32):
    """One QatLinear."""
    samples = torch.randn(16, k).to(dtype)
    return prepare_qat(nn.Linear(k, n, bias).to(dtype), trine.Recipe(linear=choice), samples)


def two_layers(choice: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3, bias=False))
    samples = torch.randn(16, 20).to(dtype)
    return prepare_qat(model.to(dtype), trine.Recipe(linear=choice), samples)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    error = (actual.double() - expected.double()).norm()
    return (error / expected.double().norm().clamp_min(1e-30)).item()


class TestWeightRules:
    def test_int8_absmax_by_hand(self):
        weight = torch.tensor([[1.0, -0.5, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0], [-3.0, 3.0, 0.1, 1.5]])
        codes, scale = int8_absmax(weight)
        # 0.5 * 127 = 63.5 rounds to the even 64, 0.25 * 127 = 31.75 to 32, 0.1 * 127 / 3 to 4.
        assert codes.tolist() == [[127, -64, 32, 0], [0, 0, 0, 0], [-127, 127, 4, 64]]
        assert_same_bits(scale, torch.tensor([1.0, 0.0, 3.0]) / torch.tensor(127.0))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_ternary_absmean_by_hand(self, dtype):
        weight = torch.tensor([[1.0, -0.5, 0.25], [-0.125, 2.0, 0.125]]).to(dtype)
        codes, scale = ternary_absmean(weight)  # mean 4 / 6; half of it is 0.333
        assert codes.tolist() == [[1, -1, 0], [0, 1, 0]]
        assert_same_bits(scale, torch.tensor([4.0 / 6.0]))
        assert [t.tolist() for t in ternary_absmean(torch.zeros(2, 2))] == [[[0, 0], [0, 0]], [0.0]]

    def test_ternary24_absmean_by_hand(self):
        # kept are 4, -2, 1 and 1, of mean 2: 1 is half of it, and is rounded to even
        weight = torch.tensor([[4.0, 0.5, -2.0, 0.25, 1.0, 1.0, 0.5, -0.5]])
        codes, scale = ternary24_absmean(weight)
        assert (codes.tolist(), scale.tolist()) == ([[1, 0, -1, 0, 0, 0, 0, 0]], [2.0])
        codes, scale = ternary24_absmean(torch.zeros(2, 4))
        assert (codes.tolist(), scale.tolist()) == ([[0] * 4] * 2, [0.0])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_ternary24_keeps_a_weight_of_its_kind(self, dtype):
        codes = torch.randint(-1, 2, (33, 70), dtype=torch.int8) * (torch.arange(70) % 4 > 1)
        again, scale = ternary24_absmean((codes * 0.3).to(dtype))
        assert torch.equal(again, codes)
        assert scale == torch.tensor([0.3]).to(dtype)

    def test_ternary_twn_by_hand(self):
        codes, scale = ternary_twn(torch.tensor([[1.0, -0.5, 0.25], [-0.125, 2.0, 0.125]]))
        # mean 4 / 6, threshold 0.467: 1, -0.5 and 2 lie beyond it
        assert codes.tolist() == [[1, -1, 0], [0, 1, 0]]
        assert_same_bits(scale, torch.tensor([3.5 / 3]))
        assert [t.tolist() for t in ternary_twn(torch.zeros(2, 2))] == [[[0, 0], [0, 0]], [0.0]]

    def test_ternary_twn_has_the_best_scale_for_its_codes(self):
        weight = torch.randn(30, 40)
        codes, scale = ternary_twn(weight)
        best = (weight.double() * codes).sum() / (codes != 0).sum()  # least squares
        assert scale.item() == pytest.approx(best.item(), rel=1e-6)

    def test_ternary_rounds_half_to_even(self):
        codes, scale = ternary_absmean(torch.tensor([[0.5, -0.5, 1.5, 1.5]]))
        assert scale.tolist() == [1.0]
        assert codes.tolist() == [[0, 0, 1, 1]]

    def test_ternary_scale_does_not_depend_on_threads(self, threads):
        weight = torch.randn(999, 1001)
        threads(1)
        alone = ternary_absmean(weight)
        threads(3)
        for a, b in zip(alone, ternary_absmean(weight), strict=True):
            assert torch.equal(a, b)

    def test_two_of_four_by_hand(self):
        weight = torch.tensor(
            [[3.0, -4.0, 1.0, 2.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 5.0, -6.0], [0, 2, -2, 2, 7, 0]]
        )
        assert two_of_four(weight).int().tolist() == [
            [1, 1, 0, 0, 1, 1],
            [1, 1, 0, 0, 1, 1],
            [0, 1, 1, 0, 1, 1],
        ]

    def test_two_of_four_shows_nan(self):
        """Two of every four stay, wherever NaN is among them, and NaN does."""
        values = [torch.nan, -torch.nan, torch.inf, -0.0, 0.0, 2.0, -3.0]
        weight = torch.tensor(list(itertools.product(values, repeat=4)))
        mask = two_of_four(weight)
        assert (mask.sum(1) == 2).all()
        assert ((weight.isnan() & mask).sum(1) == weight.isnan().sum(1).clamp(max=2)).all()
        assert torch.equal(two_of_four(weight.bfloat16()), mask)
        assert torch.equal(two_of_four(weight.T.contiguous().T), mask)

    @pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 40, 101])
    def test_two_of_four_is_the_best_choice(self, k):
        weight = torch.randint(-3, 4, (30, k)).float()  # many ties
        mask = two_of_four(weight)
        for row in range(30):
            for start in range(0, k, 4):
                magnitude = weight[row, start : start + 4].abs().tolist()
                order = sorted(range(len(magnitude)), key=lambda i: (-magnitude[i], i))
                kept = mask[row, start : start + 4].nonzero().flatten().tolist()
                assert kept == sorted(order[:2])


@pytest.mark.parametrize("choice", ALL)
class TestForward:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bias", [True, False])
    def test_eval_gives_the_bits_of_the_converted_layer(self, isa, choice, bias, dtype):
        for m, n, k in SHAPES:
            qat = prepared(choice, k, n, bias, dtype).eval()
            converted = trine.convert(qat)
            assert isinstance(converted, packed_nn.PackedLinear)
            for x in (torch.randn(m, k).to(dtype), torch.randn(2, 0, k).to(dtype)):
                expected = converted(x)
                assert_same_bits(qat(x).detach(), expected)  # with autograd
                with torch.no_grad():
                    assert_same_bits(qat(x), expected)
                with torch.inference_mode():
                    assert_same_bits(qat(x), expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_training_is_close_to_eval(self, choice, dtype):
        # fp32: both round the same products, in another order at most; 16 bits: to the last bit.
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        for m, n, k in SHAPES:
            qat = prepared(choice, k, n, dtype=dtype)
            x = (torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None]).to(dtype)
            in_training = qat.train()(x)
            assert in_training.dtype == dtype
            assert relative_error(in_training, qat.eval()(x)) <= tolerance

    def test_integer_products_are_exact_in_training(self, choice):
        if choice in FLOAT_INPUT:
            return  # sums floats, whose order is free
        qat = prepared(choice, 60, 8)  # 127 * 127 * 60 < 2**24
        x = torch.randn(4, 60)
        assert_same_bits(qat.train()(x), qat.eval()(x))

    def test_zero_and_invalid_rows(self, choice):
        qat, x = prepared(choice, 64, 5), difficult_rows(64, torch.float32)[[0, 1, 2, 4, 5, 6, 7]]
        in_training, in_eval = qat.train()(x), qat.eval()(x)
        assert torch.equal(in_training[1], qat.bias)
        assert torch.equal(in_eval[1], qat.bias)
        if choice == "int8-weight":  # a sum of floats may be infinite
            assert not in_training[4:6].isfinite().any()
            assert not in_eval[4:6].isfinite().any()
        elif choice != "sparse24":  # it reads only the columns that it stores
            assert in_training[4:6].isnan().all()
            assert in_eval[4:6].isnan().all()

    def test_wrong_number_of_features(self, choice):
        for layer in (prepared(choice).train(), prepared(choice).eval()):
            with pytest.raises(ValueError, match=r"expected \[\.\.\., 37\]"):
                layer(torch.randn(2, 36))

    @pytest.mark.parametrize(("k", "n"), [(0, 5), (37, 0)])
    def test_empty_sides(self, choice, k, n):
        for training in (True, False):
            layer = QatLinear(k, n, choice=choice).train(training)
            layer.begin_input(*torch.tensor([-1.0, 1.0, 0.5]))
            y = layer(torch.randn(2, 3, k))
            y.sum().backward()
            assert_same_bits(y.detach(), layer.bias.detach().expand(2, 3, n))

    def test_wrong_dtype(self, choice):
        for layer in (prepared(choice).train(), prepared(choice).eval()):
            for x in (torch.ones(2, 37).double(), torch.ones(2, 37).int()):
                with pytest.raises(ValueError, match="must be float32, bfloat16 or float16"):
                    layer(x)


def quantised_by_hand(choice: str, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What x and the weight are rounded to, in float64, from the formulas."""
    rows, values = x.double(), weight.double()
    if "24" in choice:
        n, k = values.shape
        groups = torch.cat((values, torch.zeros(n, -k % 4)), 1).reshape(n, -1, 4)
        largest = groups.abs().topk(2).indices
        groups = torch.zeros_like(groups).scatter(2, largest, groups.gather(2, largest))
        values = groups.reshape(n, -1)[:, :k]
    if choice.endswith(("int8", "int8-weight")):
        step = values.abs().amax(1, keepdim=True) / 127
        values = (values / step).round() * step
    if choice == "ternary-twn":
        beyond = values.abs() > 0.7 * values.abs().mean()
        values = values.sign() * beyond * values.abs()[beyond].mean()
    elif choice.startswith("ternary"):
        counted = values[values != 0] if "24" in choice else values
        step = counted.abs().mean()
        values = (values / step).round().clamp(-1, 1) * step
    if choice not in FLOAT_INPUT:
        step = rows.abs().amax(1, keepdim=True) / 127
        rows = (rows / step).round() * step
    return rows, values


@pytest.mark.parametrize("choice", CHOICES)
class TestGradient:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("bias", [True, False])
    def test_straight_through_against_float64(self, choice, bias, training):
        qat = prepared(choice, bias=bias).train(training)
        x = torch.randn(2, 4, 37, requires_grad=True)
        grad_y = torch.randn(2, 4, 5)
        qat(x).backward(grad_y)
        rows, values = quantised_by_hand(choice, x.detach().reshape(8, 37), qat.weight.detach())
        grad = grad_y.double().reshape(8, 5)
        assert relative_error(x.grad.reshape(8, 37), grad @ values) < 1e-6
        assert relative_error(qat.weight.grad, grad.T @ rows) < 1e-6
        if bias:
            assert relative_error(qat.bias.grad, grad.sum(0)) < 1e-6

    def test_in_bfloat16_it_is_rounded_as_that_of_a_plain_layer(self, choice):
        """Once for each factor and the result: three roundings of 2**-9."""
        qat = prepared(choice)
        x = torch.randn(8, 37).bfloat16().requires_grad_()
        grad_y = torch.randn(8, 5).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            y = qat(x)
        y.backward(grad_y)
        rows, values = quantised_by_hand(choice, x.detach(), qat.weight.detach())
        assert relative_error(x.grad, grad_y.double() @ values) < 3 * 2**-9
        assert relative_error(qat.weight.grad, grad_y.double().T @ rows) < 3 * 2**-9
        assert relative_error(qat.bias.grad, grad_y.double().sum(0)) < 1e-6

    def test_only_what_needs_a_gradient_gets_one(self, choice):
        qat = prepared(choice)
        qat.weight.requires_grad_(False)
        x = torch.randn(2, 37)
        qat(x).sum().backward()
        assert qat.weight.grad is None
        assert qat.bias.grad is not None
        with torch.no_grad():
            assert not qat(x).requires_grad

    def test_pruned_weights_keep_receiving_gradient(self, choice):
        qat = prepared(choice)
        qat(torch.randn(64, 37)).square().sum().backward()
        assert (qat.weight.grad != 0).all()

    def test_second_derivative_is_an_error(self, choice):
        x = torch.randn(2, 37, requires_grad=True)
        (grad,) = torch.autograd.grad(prepared(choice)(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gradients_have_the_dtype_of_their_tensor(self, choice, dtype):
        qat = prepared(choice, dtype=dtype)
        x = torch.randn(2, 37).to(dtype).requires_grad_()
        qat(x).sum().backward()
        assert x.grad.dtype == qat.weight.grad.dtype == qat.bias.grad.dtype == dtype


@pytest.mark.parametrize("choice", ALL)
class TestTraining:
    def test_loss_falls_and_the_converted_model_gives_the_same_bits(self, choice):
        x = torch.randn(256, 20)
        labels = (x @ torch.randn(20, 3)).argmax(1)
        qat = two_layers(choice)
        optimizer = torch.optim.Adam(qat.parameters(), lr=0.01)
        losses = []
        for _ in range(60):
            loss = nn.functional.cross_entropy(qat(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        qat.eval()
        converted = trine.convert(qat)
        assert_same_bits(qat(x).detach(), converted(x))
        assert nn.functional.cross_entropy(converted(x), labels) < 0.6 * losses[0]


@pytest.mark.parametrize("choice", CHOICES)
class TestNothingStale:
    """Whatever changes the weight in evaluation mode, the next call sees it."""

    @pytest.mark.parametrize(
        "change",
        [
            lambda qat: torch.optim.SGD(qat.parameters(), lr=1.0).step(),
            lambda qat: qat.load_state_dict(prepared("int8").state_dict()),
            lambda qat: qat.load_state_dict(prepared("int8").state_dict(), assign=True),
            lambda qat: qat.weight.data.mul_(-1),
            lambda qat: qat.weight.data.copy_(torch.randn(5, 37)),
            lambda qat: setattr(qat.weight, "data", torch.randn(5, 37)),
            lambda qat: setattr(qat, "weight", nn.Parameter(torch.randn(5, 37))),
            lambda qat: nn.init.normal_(qat.weight),
            lambda qat: qat.bias.data.add_(1),
            lambda qat: qat.half().float(),
            lambda qat: qat.bfloat16(),
            lambda qat: qat.train().eval(),
        ],
    )
    def test_after(self, choice, change):
        qat, x = prepared(choice).eval(), torch.randn(3, 37)
        qat(x).sum().backward()
        change(qat)
        x = x.to(qat.weight.dtype)
        expected = packed_nn.pack_linear(qat, choice)(x)
        assert_same_bits(qat(x).detach(), expected)
        assert_same_bits(trine.convert(qat)(x), expected)

    def test_unchanged_weight_is_packed_once(self, choice, monkeypatch):
        qat, x = prepared(choice).eval(), torch.randn(3, 37)
        packings = []
        pack = QatLinear.pack
        monkeypatch.setattr(QatLinear, "pack", lambda self: packings.append(0) or pack(self))
        for _ in range(3):
            qat(x)
        assert len(packings) == 1

    def test_copies_do_not_share_what_was_packed(self, choice):
        qat, x = prepared(choice).eval(), torch.randn(3, 37)
        y = qat(x).detach()
        for other in (copy.deepcopy(qat), pickle.loads(pickle.dumps(qat))):
            assert other._packed is None  # nor carry it about
            assert_same_bits(other(x).detach(), y)
            other.weight.data.mul_(-2)
            other(x)
            assert_same_bits(qat(x).detach(), y)

    def test_state_is_that_of_the_float_layer(self, choice):
        qat = prepared(choice).eval()
        qat(torch.randn(3, 37))
        assert list(qat.state_dict()) == ["weight", "bias"]
        assert [name for name, _ in qat.named_modules()] == [""]
        nn.Linear(37, 5).load_state_dict(qat.state_dict())

    def test_a_diverged_weight_is_an_error_in_eval(self, choice):
        qat = prepared(choice).eval()
        qat.weight.data[0, 0] = torch.nan
        with pytest.raises(ValueError, match="NaN or infinity"):
            qat(torch.randn(3, 37))
        with pytest.raises(ValueError, match="NaN or infinity"):
            trine.convert(qat)


class TestPrepareAndConvert:
    def test_only_the_chosen_layers_change(self):
        model = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)).eval()
        before = copy.deepcopy(model)
        qat = prepare_qat(model, trine.Recipe(linear={"2": "int8"}))
        assert [type(m) for m in qat] == [nn.Linear, nn.ReLU, QatLinear, nn.Linear]
        assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.Linear]
        assert list(qat.state_dict()) == list(model.state_dict())
        assert not any(m.training for m in qat.modules())
        with torch.no_grad():
            for p in qat.parameters():
                p.zero_()
        for a, b in zip(model.parameters(), before.parameters(), strict=True):
            assert torch.equal(a, b)

        converted = trine.convert(qat)
        assert [type(m) for m in converted] == [
            nn.Linear,
            nn.ReLU,
            packed_nn.Int8Linear,
            nn.Linear,
        ]
        assert type(qat[2]) is QatLinear
        assert not any(m.training for m in converted.modules())
        assert trine.convert(qat.train()).training

    def test_tied_weights_are_left_alone_and_reported(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding = nn.Embedding(9, 4)
                self.middle = nn.Linear(4, 4)
                self.head = nn.Linear(4, 9, bias=False)
                self.head.weight = self.embedding.weight

        qat = prepare_qat(Tied(), trine.Recipe(linear="int8"))
        assert type(qat.head) is nn.Linear
        assert qat.head.weight is qat.embedding.weight
        assert type(qat.middle) is QatLinear
        assert list(qat.qat_skipped) == ["head"]
        assert "shared" in qat.qat_skipped["head"]
        converted = trine.convert(qat)
        assert converted.head.weight is converted.embedding.weight

    def test_a_layer_that_is_used_twice_stays_one_layer(self):
        shared = nn.Linear(4, 4)
        qat = prepare_qat(nn.Sequential(shared, nn.ReLU(), shared), trine.Recipe())
        assert qat[0] is qat[2]
        assert type(qat[0]) is QatLinear
        assert len(list(qat.parameters())) == 2
        converted = trine.convert(qat)
        assert converted[0] is converted[2]

    def test_hooks_go_along(self):
        model = nn.Sequential(nn.Linear(4, 4))
        model[0].register_forward_hook(lambda module, args, output: output + 1000)
        model[0].register_forward_pre_hook(
            lambda module, args, kwargs: ((args[0] * 0,), kwargs), with_kwargs=True
        )
        qat = prepare_qat(model, trine.Recipe()).eval()
        for other in (qat, trine.convert(qat)):
            y = other(torch.randn(2, 4))
            torch.testing.assert_close(y, (model[0].bias + 1000).expand(2, 4))

    def test_frozen_parameters_stay_frozen(self):
        linear = nn.Linear(4, 4)
        linear.weight.requires_grad_(False)
        qat = prepare_qat(linear, trine.Recipe())
        assert not qat.weight.requires_grad
        assert qat.bias.requires_grad

    def test_transformer_encoder_layer_uses_the_packed_weights(self):
        model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        qat = prepare_qat(model, trine.Recipe(linear="int8")).eval()
        assert list(qat.qat_skipped) == ["self_attn.out_proj"]
        converted, x = trine.convert(qat), torch.randn(2, 5, 16)
        calls = []
        converted.linear1.register_forward_hook(lambda *args: calls.append(0))
        with torch.no_grad():
            y = converted(x)
            assert calls == [0]
            assert_same_bits(qat(x), y)

    def test_errors(self):
        broken = two_layers("int8")
        broken[2].weight.data[0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"layer '2': .*NaN or infinity"):
            trine.convert(broken)
        with pytest.raises(ValueError, match="no QatLinear"):
            trine.convert(nn.Linear(3, 3))
        with pytest.raises(ValueError, match=r"convert takes a torch\.nn\.Module; got dict"):
            trine.convert({})
        with pytest.raises(ValueError, match=r"prepare_qat takes a torch\.nn\.Module; got dict"):
            prepare_qat({}, trine.Recipe())
        with pytest.raises(ValueError, match=r"prepare_qat takes a trine\.Recipe; got str"):
            prepare_qat(nn.Linear(3, 3), "int8")
        with pytest.raises(ValueError, match=r"leave no nn\.Linear"):
            prepare_qat(nn.Conv2d(3, 3, 1), trine.Recipe())
        with pytest.raises(ValueError, match=r"leave no nn\.Linear"):
            prepare_qat(nn.Linear(3, 3), trine.Recipe(linear="float"))
        with pytest.raises(ValueError, match=r"leave no nn\.Linear.*float64"):
            prepare_qat(nn.Linear(3, 3).double(), trine.Recipe())
        with pytest.raises(ValueError, match="choice is 'int4'"):
            QatLinear(3, 3, choice="int4")


def test_int8_rows_agree_on_every_device():
    """The operator, and the plain PyTorch that stands in for it where a device lacks it."""
    x = difficult_rows(37, torch.float32)
    for a, b in zip(trine.ops.quantize_rows(x), reference.quantize_rows(x), strict=True):
        assert_same_bits(a, b)
