"""Batch norms folded into the layers before them: in floats, after training and in it."""

import copy

import pytest
import torch
import trine
from linear_inputs import assert_same_bits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from trine import Recipe
from trine.chain.stages import Ground, Qat
from trine.distill import Training
from trine.nn import Int8Conv2d, Int8Linear
from trine.quantize import QatConv2d, QatSchedule, fold_batch_norm, post_training, prepare_qat

LAYERS = {
    "linear": (lambda: nn.Linear(6, 9), nn.BatchNorm1d, (6,)),
    "1d": (lambda: nn.Conv1d(6, 9, 3, bias=False), nn.BatchNorm1d, (6, 8)),
    "2d": (lambda: nn.Conv2d(6, 9, 3, groups=3), nn.BatchNorm2d, (6, 7, 7)),
    "3d": (lambda: nn.Conv3d(6, 9, (1, 2, 2)), nn.BatchNorm3d, (6, 3, 4, 4)),
}


def trained(norm: nn.Module) -> nn.Module:
    """As after some training: no two channels alike, one turned around, one switched off."""
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 3)
        if norm.affine:
            norm.weight.normal_()
            norm.weight[0] = 0
            norm.bias.normal_()
    return norm


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return (actual.double() - expected).norm() <= tolerance * expected.norm()


class TestFolding:
    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize("kind", LAYERS)
    def test_folding_against_float64(self, kind, affine):
        make, norm_class, shape = LAYERS[kind]
        model = nn.Sequential(make(), trained(norm_class(9, affine=affine)), nn.ReLU()).eval()
        x = torch.randn(5, *shape)
        before = copy.deepcopy(model.state_dict())
        small = fold_batch_norm(model, x)
        assert small.folded_batch_norms == {"0": "1"}
        assert [type(m) for m in small] == [type(model[0]), nn.Identity, nn.ReLU]

        layer, norm = copy.deepcopy(model[0]).double(), model[1]
        over = 1 / (norm.running_var.double() + norm.eps).sqrt()
        gamma, beta = (norm.weight.double(), norm.bias.double()) if affine else (1.0, 0.0)
        weight = layer.weight * (gamma * over).reshape(-1, *[1] * (layer.weight.dim() - 1))
        bias = (0 if layer.bias is None else layer.bias) - norm.running_mean.double()
        assert close(small[0].weight, weight, 1e-6)
        assert close(small[0].bias, bias * gamma * over + beta, 1e-6)
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])

    def test_only_what_reads_a_layer_alone_is_folded(self):
        class Network(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                conv = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(7)]
                self.conv = nn.ModuleList(conv)
                self.norm = nn.ModuleList(trained(nn.BatchNorm2d(4)) for _ in range(6))
                self.loose = nn.BatchNorm2d(4, track_running_stats=False)
                self.linear, self.tokens = nn.Linear(4, 9), trained(nn.BatchNorm1d(7))

            def forward(self, x):
                x = self.norm[0](self.conv[0](x))
                y = self.conv[1](x)
                x = self.norm[1](y) + y  # read twice
                x = self.norm[2](self.conv[2](x) + x)  # a sum is read
                x = self.norm[3](self.conv[3](self.conv[3](x)))  # two calls, one of them read
                x = self.norm[4](self.conv[4](x)).relu()
                x = self.norm[4](x)  # which reads something else, too
                x = self.loose(self.conv[5](x))
                y = self.conv[6](x)
                x = self.norm[5](y)
                return y, self.tokens(self.linear(x.flatten(2).mT[:, :7]))

        model, x = Network().eval(), torch.randn(2, 4, 5, 5)
        small = fold_batch_norm(model, [x])
        assert small.folded_batch_norms == {"conv.0": "norm.0"}
        for a, b in zip(small(x), model(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        named = fold_batch_norm(model, batch_norms={"conv.0": "norm.0"})
        assert_same_bits(named(x)[1], small(x)[1])

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ({}, "needs example_inputs"),
            ({"batch_norms": {"0": "3"}}, "no module '3'"),
            ({"batch_norms": {"0": "2"}}, "'2' cannot be folded: it is a ReLU"),
            ({"batch_norms": {"2": "1"}}, r"'1' \(BatchNorm2d of 5\) does not fit '2'"),
            ({"example_inputs": []}, "there is no data"),
        ],
    )
    def test_errors(self, how, message):
        model = nn.Sequential(nn.Conv2d(2, 5, 1), nn.BatchNorm2d(5), nn.ReLU())
        with pytest.raises(ValueError, match=message):
            fold_batch_norm(model, **how)
        with pytest.raises(ValueError, match="no batch norm with running statistics"):
            fold_batch_norm(model[:1], torch.randn(1, 2, 3, 3))


def quantised(t: Tensor) -> Tensor:
    """Each row by its largest magnitude, with the gradient of the identity."""
    step = t.detach().abs().flatten(1).amax(1).reshape(-1, *[1] * (t.dim() - 1)) / 127
    return t + ((t / torch.where(step == 0, 1.0, step)).round() * step - t).detach()


def pair(kind: str, bias: bool = True) -> tuple[nn.Sequential, Tensor]:
    if kind == "conv":
        layer, norm, x = nn.Conv2d(4, 6, 3, 2, 1, bias=bias), nn.BatchNorm2d(6), (5, 4, 7, 7)
    else:
        layer, norm, x = nn.Linear(8, 6, bias), nn.BatchNorm1d(6), (9, 8)
    return nn.Sequential(layer, trained(norm)), torch.randn(x)


def prepared(kind: str, choice: str = "int8", bias: bool = True) -> tuple[nn.Module, Tensor]:
    model, x = pair(kind, bias)
    return prepare_qat(model, Recipe(choice, conv=choice), x), x


@pytest.mark.parametrize("kind", ["conv", "linear"])
class TestTraining:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("frozen", [False, True])
    def test_folded_in_training_against_float64(self, kind, frozen, bias):
        qat, x = prepared(kind, bias=bias)
        QatSchedule(qat, freeze_batch_norm=0 if frozen else 5)
        x.requires_grad_()
        y = qat(x)
        grad = torch.randn_like(y)
        y.backward(grad)

        layer, norm = qat[0], qat[0].norm
        wide, weight, gamma, beta = (
            t.detach().double().requires_grad_() for t in (x, layer.weight, norm.weight, norm.bias)
        )
        b = torch.zeros(6).double() if layer.bias is None else layer.bias.detach().double()
        b.requires_grad_()

        def apply(values: Tensor, matrix: Tensor) -> Tensor:
            if kind == "linear":
                return functional.linear(values, matrix)
            return functional.conv2d(values, matrix, None, 2, 1)

        by_output = [-1, *[1] * (weight.dim() - 1)]
        by_channel = [-1, *[1] * (x.dim() - 2)]
        sigma = (norm.running_var.double() + norm.eps).sqrt()
        product = apply(quantised(wide), quantised(weight * (gamma / sigma).reshape(by_output)))
        if frozen:
            shift = beta + (b - norm.running_mean.double()) * gamma / sigma
            expected = product + shift.reshape(by_channel)
        else:  # as in the paper: c = sigma_B / sigma, undone after the product
            plain = apply(wide, weight) + b.reshape(by_channel)
            channels = plain.transpose(0, 1).flatten(1)
            sigma_b = (channels.var(1, correction=0) + norm.eps).sqrt()
            shift = beta - (channels.mean(1) - b) * gamma / sigma_b
            expected = product / (sigma_b / sigma).reshape(by_channel) + shift.reshape(by_channel)
        expected.backward(grad.double())
        assert close(y.detach(), expected.detach())
        for found, truth in (
            (x, wide),
            (layer.weight, weight),
            (norm.weight, gamma),
            (norm.bias, beta),
        ):
            assert close(found.grad, truth.grad, 2e-5)
        if bias:
            assert (layer.bias.grad - b.grad).abs().max() < 1e-5  # 0 until it is frozen

    def test_it_is_the_batch_norm_until_frozen_and_then_the_kernel(self, kind):
        model, x = pair(kind)
        qat = prepare_qat(model, Recipe("int8", conv="int8"), x)
        schedule = QatSchedule(qat, freeze_batch_norm=3)
        model.train()
        for _ in range(3):
            x = 2 * torch.randn_like(x) + 1
            expected = model(x)
            assert (qat(x) - expected).norm() < 0.05 * expected.norm()
            schedule.step()
        norm = qat[0].norm
        torch.testing.assert_close(norm.running_mean, model[1].running_mean)
        torch.testing.assert_close(norm.running_var, model[1].running_var)
        assert norm.num_batches_tracked == model[1].num_batches_tracked
        in_training = qat(x).detach()
        assert close(in_training, qat.eval()(x).detach().double())
        qat.train()(100 * x)
        schedule.step()
        torch.testing.assert_close(norm.running_mean, model[1].running_mean)  # it rests
        small = trine.convert(qat.eval())
        assert type(small[0]) is (Int8Conv2d if kind == "conv" else Int8Linear)
        assert type(small[1]) is nn.Identity
        assert small[0].bias is not None
        assert_same_bits(small(x), qat(x).detach())
        with torch.no_grad():
            assert_same_bits(small(x), qat(x))

    def test_batches_of_one_update_count_alike_and_checkpointing_changes_nothing(self, kind):
        plain, x = prepared(kind)
        again = copy.deepcopy(plain)
        for model in (plain, again):
            for batch in (x, 3 * x + 1):
                y = (
                    model(batch)
                    if model is plain
                    else checkpoint(model, batch, use_reentrant=False)
                )
                y.sum().backward()
            QatSchedule(model).step()
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(again[0].norm, name), getattr(plain[0].norm, name))
        assert torch.equal(plain[0].weight.grad, again[0].weight.grad)
        assert plain[0].norm.num_batches_tracked == 1

    def test_nothing_stale(self, kind):
        qat, x = prepared(kind)
        qat.eval()
        for tensor in (*qat[0].norm.parameters(), *list(qat[0].norm.buffers())[:2], qat[0].bias):
            qat(x)
            tensor.data.add_(0.5)
            assert_same_bits(qat(x).detach(), trine.convert(qat)(x))

    def test_errors(self, kind):
        qat, x = prepared(kind)
        qat(x)
        with pytest.raises(ValueError, match=r"layer '0': .* call QatSchedule\(model\)\.step\(\)"):
            trine.convert(qat)
        with pytest.raises(ValueError, match="more than one value for each of its 6 channels"):
            qat(x[:1, ..., :1, :1] if kind == "conv" else x[:1])


@pytest.mark.parametrize(
    "choice", ["int8-lsq", "int8-static", "ternary", "ternary-ttq", "sparse24"]
)
def test_every_kind_of_scheme_quantises_folded_weights(choice):
    model, x = pair("linear")
    qat = prepare_qat(model, Recipe(choice), x)
    schedule = QatSchedule(qat, freeze_batch_norm=1)
    optimizer = torch.optim.SGD(qat.parameters(), 1e-3)
    for _ in range(2):
        qat(x).square().sum().backward()
        optimizer.step()
        schedule.step()
    in_training = qat(x).detach()
    assert close(in_training, qat.eval()(x).detach().double())
    assert_same_bits(trine.convert(qat)(x), qat(x).detach())


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.one = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.two = nn.BatchNorm2d(8)
        self.head, self.three, self.last = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.one(self.first(x)).relu()
        x = (x + self.two(self.second(x))).mean((2, 3))
        return self.last(self.three(self.head(x)).relu())


FOLDED = {"first": "one", "second": "two", "head": "three"}


def test_a_network_trains_converts_and_is_loaded(tmp_path):
    x = torch.randn(64, 3, 6, 6)
    labels = (x[:, 0].mean((1, 2)) > 0).long()
    qat = prepare_qat(Network(), Recipe("int8", conv="int8-static"), x)
    assert qat.qat_folded == FOLDED
    schedule = QatSchedule(qat, freeze_ranges=20, freeze_batch_norm=20)
    optimizer, losses = torch.optim.Adam(qat.parameters(), 0.02), []
    for _ in range(40):
        loss = functional.cross_entropy(qat(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    again = QatSchedule(copy.deepcopy(qat), freeze_batch_norm=30)
    again.load_state_dict(schedule.state_dict())
    assert again.norms[0].frozen
    small = trine.convert(qat.eval())
    assert_same_bits(small(x), qat(x).detach())
    trine.save(small, tmp_path / "small.trine")
    assert_same_bits(trine.load(tmp_path / "small.trine", like=Network)(x), small(x))


def test_after_training_batch_norms_are_folded_first(tmp_path):
    model, x = Network(), torch.randn(64, 3, 6, 6)
    for norm in (model.one, model.two, model.three):
        trained(norm)
    small = post_training(model.eval(), Recipe("int8", conv="int8"), iter([x[:32], x[32:]]))
    assert small.folded_batch_norms == FOLDED
    folded = fold_batch_norm(model, x)
    assert_same_bits(small.second.bias, folded.second.bias.detach())
    assert_same_bits(small.first(x), Int8Conv2d.from_conv(folded.first)(x))
    assert (small(x) - model(x)).norm() < 0.05 * model(x).norm()
    trine.save(small, tmp_path / "small.trine")
    assert_same_bits(trine.load(tmp_path / "small.trine", like=Network)(x), small(x))


def test_what_is_folded_can_be_said():
    model, x = Network(), torch.randn(4, 3, 6, 6)
    recipe = Recipe("float", conv="int8")
    assert prepare_qat(model, recipe, batch_norms={"first": "one"}).qat_folded == {"first": "one"}
    none = prepare_qat(model, recipe, x, batch_norms={})
    assert none.qat_folded == {}
    assert type(none.one) is nn.BatchNorm2d
    assert type(none.first) is QatConv2d
    assert prepare_qat(model, recipe, x).qat_folded == {"first": "one", "second": "two"}
    with pytest.raises(ValueError, match="'head' of batch_norms is no layer to train"):
        prepare_qat(model, recipe, batch_norms={"head": "three"})
    with pytest.raises(ValueError, match="freeze_batch_norm is given, but no layer"):
        QatSchedule(
            prepare_qat(nn.Linear(6, 2), Recipe("int8-static"), x[0, 0]), freeze_batch_norm=1
        )


def test_the_stage_of_a_recipe_moves_and_freezes_it(tmp_path):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    x = 3 * torch.randn(64, 6) + 1
    labels = (x.sum(1) > 6).long()
    loader = DataLoader(TensorDataset(x, labels), 16)
    ground = Ground(copy.deepcopy(model), loader, loader, {"input": x})
    folder = tmp_path / "qat"
    small = Qat(training=Training(epochs=6, learning_rate=0.02)).apply(model, ground, folder)
    assert [type(m) for m in small[:2]] == [Int8Linear, nn.Identity]
    state = torch.load(next(folder.rglob("*.pt")), weights_only=True)
    assert state["schedule"] == {"updates": 24}
    (moved,) = (v for name, v in state["lesson"].items() if name.endswith("num_batches_tracked"))
    assert moved == 16  # two thirds of the updates
