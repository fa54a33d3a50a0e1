"""Training to 2:4 and permuting channels for it, against their formulas by hand."""

import copy

import pytest
import torch
import trine
from torch import nn
from trine.prune import sr_ste
from trine.quantize import QatLinear, two_of_four

# ---- SR-STE ----


def kept_by_hand(weight: torch.Tensor) -> torch.Tensor:
    kept = torch.zeros_like(weight, dtype=torch.bool)
    for row, of_row in enumerate(weight.tolist()):
        for first in range(0, len(of_row), 4):
            group = range(first, min(first + 4, len(of_row)))
            for j in sorted(group, key=lambda j: abs(of_row[j]), reverse=True)[:2]:
                kept[row, j] = True
    return kept


@pytest.mark.parametrize("columns", [12, 10])
def test_sr_ste_gradient(columns):
    """dL/dW of the sparse layer, dense, plus decay * W where the mask is 0."""
    model, x, target = nn.Linear(columns, 5), torch.randn(7, columns), torch.randn(7, 5)
    prepared = sr_ste(model, decay=0.3)
    assert isinstance(prepared, QatLinear)
    (prepared(x) - target).square().sum().backward()

    weight, bias = model.weight.detach().double(), model.bias.detach().double()
    kept = kept_by_hand(weight)
    used = torch.where(kept, weight, 0)
    error = 2 * (x.double() @ used.T + bias - target.double())
    expected = error.T @ x.double() + 0.3 * torch.where(kept, 0, weight)
    torch.testing.assert_close(prepared.weight.grad.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prepared.bias.grad.double(), error.sum(0), rtol=1e-5, atol=1e-5)
    assert model.weight.grad is None


def test_without_gradients_of_the_loss_the_unused_weights_alone_shrink():
    prepared = sr_ste(nn.Linear(16, 8), decay=1.0)
    start = prepared.weight.detach().clone()
    kept = kept_by_hand(start)
    optimizer = torch.optim.SGD(prepared.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (0 * prepared(torch.randn(2, 16))).sum().backward()
        optimizer.step()
    torch.testing.assert_close(prepared.weight[~kept], start[~kept] * 0.5**3)
    assert torch.equal(prepared.weight[kept], start[kept])


@pytest.mark.parametrize("values", ["float", "int8"])
def test_sr_ste_trains_and_ends_in_the_same_bits(values):
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))
    before = copy.deepcopy(model.state_dict())
    prepared = sr_ste(model, skip="2", decay=1e-2, values=values)
    assert type(prepared[2]) is nn.Linear
    x, labels = torch.randn(64, 32), torch.randint(4, (64,))
    optimizer = torch.optim.SGD(prepared.parameters(), 0.5)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(prepared(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    served = trine.convert(prepared.eval())
    assert isinstance(served[0], trine.nn.Sparse24Linear)
    assert torch.equal(served(x), prepared(x))
    if values == "float":
        master = prepared[0].weight.detach()
        expected = torch.where(two_of_four(master), master, 0)
        assert torch.equal(served[0].dense_weight(), expected)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    again = copy.deepcopy(prepared)
    assert again[0].pruned_decay == 1e-2


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Linear(8, 4), {"decay": 0.0}, "decay is 0.0; it must be above 0"),
        (nn.Linear(8, 4), {"values": "int4"}, "values is 'int4'"),
        (nn.Sequential(nn.Conv2d(4, 4, 1)), {}, "layer '0' is a Conv2d, it must be nn.Linear"),
        (nn.Linear(8, 4).double(), {}, "layer '' must stay as it is: its weight is float64"),
    ],
)
def test_what_sr_ste_cannot_train_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        sr_ste(model, **options)


def test_a_decay_of_what_is_not_pruned_is_refused():
    with pytest.raises(ValueError, match=r"pruned_decay is 0\.1 with choice 'int8'"):
        QatLinear(4, 4, pruned_decay=0.1)
    model = nn.Linear(8, 4)
    model.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="its weight holds NaN or infinity"):
        sr_ste(model)
