"""Hard concrete gates against the formulas of the paper, and what training with them does."""

import math

import pytest
import torch
from torch import nn
from trine.prune import NM, HardConcrete, Head, Layer, Neuron, Weight, remove

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).double()


def spread_out(gates) -> None:
    """Gates of which some are off, some on and some between."""
    with torch.no_grad():
        for log_alpha in gates.parameters():
            log_alpha.copy_(torch.linspace(-4, 4, log_alpha.numel()).reshape(log_alpha.shape))


def test_the_penalty_is_how_many_weights_are_expected():
    """By the formula, and by drawing s as the paper says."""
    gates = HardConcrete(network(), Neuron())
    spread_out(gates)
    expected = 0.0
    for key, inputs in (("0", 6), ("2", 8)):
        for log_alpha in gates.log_alpha[key].tolist():
            on = 1 / (1 + math.exp(-(log_alpha - BETA * math.log(-GAMMA / ZETA))))
            u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
            s = ((u.log() - (1 - u).log() + log_alpha) / BETA).sigmoid()
            drawn = (s * (ZETA - GAMMA) + GAMMA > 0).double().mean().item()
            assert drawn == pytest.approx(on, abs=2e-5)
            expected += inputs * on
    assert gates.penalty().item() == pytest.approx(expected)


def test_the_penalty_drives_gates_off():
    """Its sign: a step down its gradient lowers every log alpha and the number expected."""
    gates = HardConcrete(network())
    before, start = gates.penalty(), [p.detach().clone() for p in gates.parameters()]
    before.backward()
    torch.optim.SGD(gates.parameters(), 0.1).step()
    assert gates.penalty() < before
    assert all((p < q).all() for p, q in zip(gates.parameters(), start, strict=True))


@pytest.mark.parametrize("granularity", [Weight(), Neuron()], ids=["weight", "neuron"])
def test_loss_of_the_masked_weights_and_its_gradients(granularity):
    """L(W * z), z and both gradients by hand from the noise that was drawn."""
    model = network()
    w, b = (p.detach().clone().requires_grad_() for p in model[0].parameters())
    w2, b2 = (p.detach().clone() for p in model[2].parameters())
    gates = HardConcrete(model, granularity, skip="2")
    spread_out(gates)
    x = torch.randn(5, 6, dtype=torch.float64)
    loss = model(x).square().sum() + 0.3 * gates.penalty()
    loss.backward()

    a = gates.log_alpha["0"].detach().double().requires_grad_()
    s = ((gates._noise["0"].double() + a) / BETA).sigmoid()
    z = (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
    assert 0 < (z == 0).sum() < z.numel()
    of_weight = z if z.dim() == 2 else z[:, None]
    bias = b if z.dim() == 2 else b * z
    own = ((x @ (w * of_weight).T + bias).relu() @ w2.T + b2).square().sum()
    own = own + 0.3 * (48 / z.numel()) * (a - BETA * math.log(-GAMMA / ZETA)).sigmoid().sum()
    own.backward()
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-7)
    parametrized = model[0].parametrizations.weight.original
    torch.testing.assert_close(parametrized.grad, w.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gates.log_alpha["0"].grad.double(), a.grad, rtol=1e-4, atol=1e-6)


def test_gates_are_drawn_for_each_forward_pass_and_fixed_in_evaluation():
    model = network()
    gates = HardConcrete(model, Neuron())
    spread_out(gates)
    x = torch.randn(3, 6, dtype=torch.float64)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    a = gates.log_alpha["0"].detach()
    fixed = (a.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
    torch.testing.assert_close(gates.gate("0", training=False).detach(), fixed)


def test_layers_of_a_head_share_its_gate():
    attention = nn.ModuleDict({name: nn.Linear(4, 8) for name in "qkv"})
    gates = HardConcrete(nn.ModuleDict({"attention": attention}), Head(4))
    spread_out(gates)
    assert list(gates.log_alpha) == ["attention"]
    shares = [
        (attention[n].weight / attention[n].parametrizations.weight.original)[::2, 0] for n in "qkv"
    ]
    for share in shares:
        torch.testing.assert_close(share, gates.gate("attention", training=True))


def test_finished_is_plain_and_the_same():
    model = network()
    names, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    gates = HardConcrete(model, Neuron(), skip="2")
    spread_out(gates)
    assert any(name.endswith("log_alpha") for name in model.state_dict())
    with pytest.raises(ValueError, match="call finish"):
        gates.removed()
    x = torch.randn(7, 6, dtype=torch.float64)
    expected = model.eval()(x)
    assert gates.finish() is model
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == names
    assert [type(m) for m in model.modules()] == kinds
    off = gates.removed()["0"]
    assert off == [i for i in range(8) if not model[0].weight[i].any()]
    assert 0 < len(off) < 8
    assert not model[0].weight[off].signbit().any()
    assert str(gates.report()).splitlines()[1].startswith(f"0      48       {len(off) / 8:.1%}")
    small = remove(model, x, gates.removed())
    assert small[0].out_features == 8 - len(off)
    torch.testing.assert_close(small(x), expected)


def test_training_finds_the_inputs_that_matter():
    """y depends on 2 of 10 inputs; the weights of the others go, those of the two stay."""
    x = torch.randn(256, 10)
    y = 2 * x[:, :1] - 3 * x[:, 4:5]
    model = nn.Linear(10, 1)
    gates = HardConcrete(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(400):
        optimizer.zero_grad()
        ((model(x) - y).square().mean() + 0.1 * gates.penalty()).backward()
        optimizer.step()
    weight = gates.finish().weight.detach()[0]
    assert weight.nonzero().flatten().tolist() == [0, 4]
    torch.testing.assert_close(weight[[0, 4]], torch.tensor([2.0, -3.0]), rtol=0.05, atol=0.05)


def test_a_whole_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    gates = HardConcrete(model, Layer())
    with torch.no_grad():
        gates.log_alpha["1"].fill_(-9)
    gates.finish()
    assert gates.dropped() == ["1"]
    assert gates.removed() == {}
    assert not model[1].weight.any()
    assert not model[1].bias.any()


def test_gates_that_cannot_be():
    with pytest.raises(ValueError, match="gates know no pattern such as N:M"):
        HardConcrete(network(), NM(2, 4))
    with pytest.raises(ValueError, match=r"dropped is a probability in \(0, 1\), it is 1"):
        HardConcrete(network(), dropped=1)
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    names = list(model.state_dict())
    with pytest.raises(ValueError, match="layer '2' cannot be pruned: its weight holds NaN"):
        HardConcrete(model)
    assert list(model.state_dict()) == names
