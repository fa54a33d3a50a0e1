"""Wanda and SparseGPT against float64 by hand, and layer by layer."""

import copy

import pytest
import torch
import trine
from torch import nn
from trine.calibration import SecondMoment, calibrate, layer_rows, output_error, weight_matrix
from trine.prune import SparseGPT, Wanda, as_sparse24, prunable_layers, sparsegpt, wanda


def mlp(width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 5)).double()


def data(rows: int = 64, columns: int = 12) -> torch.Tensor:
    """Correlated inputs of different sizes."""
    mixed = torch.randn(rows, columns) @ torch.randn(columns, columns)
    return (mixed * torch.rand(columns) * 3).double()


def inputs_of_second(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    return model[0](x).relu().detach()


# ---- criteria ----


def test_wanda_scores():
    model, x = mlp(), data()
    layers = prunable_layers(model)
    scores = Wanda([x[:20], x[20:]]).scores(model, layers)
    for name, rows in {"0": x, "2": inputs_of_second(model, x)}.items():
        weight = model.get_submodule(name).weight
        for i, j in [(0, 0), (1, 3), (4, 11)]:
            by_hand = abs(weight[i, j].item()) * sum(v * v for v in rows[:, j].tolist()) ** 0.5
            assert scores[name][i, j].item() == pytest.approx(by_hand, rel=1e-12)


def test_sparsegpt_scores():
    model, x = mlp(), data()
    scores = SparseGPT(x.double(), damping=0.05).scores(model, prunable_layers(model, "0"))["0"]
    gram = (x.T.double() @ x).float().double()  # moments are kept in float32
    hessian = gram + 0.05 * gram.diagonal().mean() * torch.eye(12).double()
    for j in range(12):
        inverse = torch.linalg.inv(hessian[j:, j:])
        expected = model[0].weight[:, j].detach() ** 2 / inverse[0, 0]
        torch.testing.assert_close(scores[:, j], expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("groups", [1, 2])
def test_scores_of_convolutions(groups):
    layer, x = nn.Conv2d(4, 6, 3, groups=groups).double(), torch.randn(2, 4, 5, 5).double()
    layers = {"": layer}
    rows = layer_rows(layer, x).reshape(groups, -1, 36 // groups)
    found = Wanda(x).scores(layer, layers)[""]
    assert found.shape == layer.weight.shape
    for out in range(6):
        norm = rows[out // (6 // groups)].square().sum(0).sqrt().view(4 // groups, 3, 3)
        torch.testing.assert_close(found[out], (layer.weight[out].abs() * norm).detach())
    assert SparseGPT(x).scores(layer, layers)[""].shape == layer.weight.shape


def test_scores_of_transposed_layers():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    transposed, x = Conv1D(5, 12).double(), data()
    linear = nn.Linear(12, 5).double()
    linear.weight.data = transposed.weight.data.T.clone()
    for criterion in (Wanda(x), SparseGPT(x)):
        of_transposed = criterion.scores(transposed, {"": transposed})[""]
        of_linear = criterion.scores(linear, {"": linear})[""]
        torch.testing.assert_close(of_transposed.T, of_linear)


# ---- Wanda ----


def wanda_by_hand(weight: torch.Tensor, rows: torch.Tensor, amount) -> torch.Tensor:
    result = weight.clone()
    norm = rows.square().sum(0).sqrt()
    for row in result:
        score = (row.abs() * norm).tolist()
        if isinstance(amount, tuple):
            n, m = amount
            for first in range(0, len(score), m):
                group = range(first, min(first + m, len(score)))
                for j in sorted(group, key=score.__getitem__, reverse=True)[n:]:
                    row[j] = 0
        else:
            for j in sorted(range(len(score)), key=score.__getitem__)[: int(amount * len(score))]:
                row[j] = 0
    return result


@pytest.mark.parametrize("amount", [0.5, 0.3, (2, 4), (1, 5)])
@pytest.mark.parametrize("sequential", [True, False])
def test_wanda(amount, sequential):
    model, x = mlp(), data()
    before = copy.deepcopy(model.state_dict())
    small = wanda(model, [x[:30], x[30:]], amount, sequential=sequential)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(small[0].weight, wanda_by_hand(model[0].weight.detach(), x, amount))
    hidden = inputs_of_second(small if sequential else model, x)
    assert torch.equal(small[2].weight, wanda_by_hand(model[2].weight.detach(), hidden, amount))


# ---- SparseGPT ----


def sparsegpt_by_hand(weight, rows, amount, damping, block) -> torch.Tensor:
    """Every removal solved with a fresh inverse over the columns that are left."""
    result, k = weight.clone(), weight.shape[1]
    gram = rows.T @ rows
    hessian = gram + damping * gram.diagonal().mean() * torch.eye(k).double()
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(k)]
    removed = torch.zeros_like(result, dtype=torch.bool)
    group = amount[1] if isinstance(amount, tuple) else block
    for j in range(k):
        if j % group == 0:
            chosen = range(j, min(j + group, k))
            cost = torch.stack([result[:, c] ** 2 / inverses[c][0, 0] for c in chosen], 1)
            if isinstance(amount, tuple):
                for row, of_row in enumerate(cost.tolist()):
                    order = sorted(range(len(of_row)), key=of_row.__getitem__, reverse=True)
                    for c in order[amount[0] :]:
                        removed[row, j + c] = True
            else:
                lowest = cost.flatten().argsort()[: int(amount * cost.numel())]
                for place in lowest.tolist():
                    removed[place // cost.shape[1], j + place % cost.shape[1]] = True
        for row in range(len(result)):
            if removed[row, j]:
                result[row, j:] -= result[row, j] / inverses[j][0, 0] * inverses[j][0]
                result[row, j] = 0
    return result


@pytest.mark.parametrize(("amount", "block"), [(0.5, 128), (0.4, 5), ((2, 4), 128), ((1, 3), 4)])
@pytest.mark.parametrize("sequential", [True, False])
def test_sparsegpt(amount, block, sequential):
    model, x = mlp(), data()
    small = sparsegpt(
        model, [x[:30], x[30:]], amount, damping=0.02, block=block, sequential=sequential
    )
    for layer, rows in ((0, x), (2, inputs_of_second(small if sequential else model, x))):
        expected = sparsegpt_by_hand(model[layer].weight.detach(), rows, amount, 0.02, block)
        found = small[layer].weight.detach()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # moments in float32
        assert torch.equal(found == 0, expected == 0)


@pytest.mark.parametrize("amount", [0.5, (2, 4)])
def test_making_up_for_what_is_gone_lowers_the_error_of_every_layer(amount):
    model, x = mlp(32).float(), data(256).float()
    moments = calibrate(model, x, lambda: SecondMoment(torch.float64))
    errors = {}
    for method in (wanda, sparsegpt):
        small = method(model, x, amount, sequential=False)
        errors[method] = [
            output_error(model[i].weight, small[i].weight, moments[str(i)].gram).item()
            for i in (0, 2)
        ]
    magnitude = [
        output_error(w, torch.where(trine.quantize.two_of_four(w), w, 0), moments[name].gram).item()
        for name, w in (("0", model[0].weight), ("2", model[2].weight))
    ]
    for i in range(2):
        assert errors[sparsegpt][i] < errors[wanda][i]
        if amount == (2, 4):
            assert errors[wanda][i] < magnitude[i]


def test_convolutions_and_transposed_layers():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 6, 1), nn.Flatten(), Conv1D(5, 6 * 4)
    ).double()
    x = torch.randn(200, 4, 4, 4).double()
    for method in (wanda, sparsegpt):
        small = method(model, x, (2, 4))
        for layer in (small[0], small[1], small[3]):
            matrix = weight_matrix(layer).flatten(0, -2)
            zeros = (nn.functional.pad(matrix, (0, -matrix.shape[1] % 4)) == 0).unflatten(
                1, (-1, 4)
            )
            assert (zeros.sum(-1) >= 2).all()
    # Groups are layers of their own.
    half = nn.Sequential(nn.Conv2d(2, 4, 3)).double()
    half[0].weight.data = model[0].weight.data[4:].clone()
    alone = sparsegpt(half, x[:, 2:], (2, 4))[0].weight
    together = sparsegpt(model, x, (2, 4), layers="0")[0].weight[4:]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_inputs_that_are_always_zero_are_pruned_first():
    model, x = nn.Sequential(nn.Linear(8, 3)), torch.randn(40, 8)
    x[:, [1, 2]] = 0
    for method in (wanda, sparsegpt):
        small = method(model, x, (2, 4))
        assert (small[0].weight[:, [1, 2]] == 0).all()
        assert torch.equal(small[0].weight[:, [0, 3]] != 0, torch.ones(3, 2, dtype=torch.bool))


def test_it_ends_in_sparse24_layers_with_the_same_weights():
    model, x = mlp().float(), data().float()
    for small in (wanda(model, x, (2, 4)), sparsegpt(model, x, (2, 4))):
        served = as_sparse24(small)
        for i in (0, 2):
            assert isinstance(served[i], trine.nn.Sparse24Linear)
            assert torch.equal(served[i].dense_weight(), small[i].weight)
        torch.testing.assert_close(served(x), small(x))


def test_progress_and_patterns():
    model, x, told = mlp(), data(), []
    small = wanda(model, x, 0.5, skip="0", progress=told.append)
    assert torch.equal(small[0].weight, model[0].weight)
    assert told == [1]


@pytest.mark.parametrize("method", [wanda, sparsegpt])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"amount": 1.0}, "amount is 1.0; it must be a share"),
        ({"amount": 2}, "amount is 2; it must be a share"),
        ({"amount": (4, 4)}, r"a pattern is \(n, m\)"),
        ({"layers": "9"}, "is named '9'"),
        ({"data": []}, "there is no data"),
        ({"data": torch.full((2, 12), torch.inf).double()}, "layer '0' holds NaN or infinity"),
        ({"batches": 0}, "batches is 0"),
    ],
)
def test_errors_leave_the_model_alone(method, change, message):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    arguments = {"data": data(), "amount": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        method(model, arguments.pop("data"), arguments.pop("amount"), **arguments)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_nan_weights_and_what_is_not_2_of_4_are_refused():
    model = mlp().float()
    with pytest.raises(ValueError, match="layer '0' has more than two non-zeros in some four"):
        as_sparse24(model)
    with pytest.raises(ValueError, match="layer '' is a Conv2d"):
        as_sparse24(nn.Conv2d(4, 4, 1))
    model[2].weight.data[0, 0] = torch.nan
    for method in (wanda, sparsegpt):
        with pytest.raises(ValueError, match="layer '2' cannot be pruned: its weight holds NaN"):
            method(model, data().float(), 0.5)
