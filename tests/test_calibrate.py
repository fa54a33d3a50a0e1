"""calibrate: statistics against float64 by hand, what it reads, and that nothing notices."""

import pytest
import torch
import trine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trine.calibration import (
    ColumnMean,
    ColumnNorm,
    ColumnRange,
    SecondMoment,
    Several,
    from_matrix,
    in_turn,
    inverse_factor,
    layer_rows,
    output_error,
    solve_columns,
    weight_matrix,
)


def everything() -> Several:
    return Several(
        norm=ColumnNorm(),
        mean=ColumnMean(),
        range=ColumnRange(),
        moment=SecondMoment(torch.float64),
    )


def assert_everything(found: Several, rows: torch.Tensor) -> None:
    """Against plain sums over all rows [M, K] (or [G, M, K]) in float64."""
    x = rows.double()
    torch.testing.assert_close(found.norm.norm, (x * x).sum(-2) ** 0.5, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.mean.mean, x.sum(-2) / x.shape[-2], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.mean.variance, x.var(-2, correction=0), rtol=1e-9, atol=1e-12)
    gram = torch.einsum("...mi,...mj->...ij", x, x)
    torch.testing.assert_close(found.moment.gram, gram, rtol=1e-10, atol=1e-10)
    assert torch.equal(found.range.low, rows.amin(-2))
    assert torch.equal(found.range.high, rows.amax(-2))
    assert torch.equal(found.range.absmax, rows.abs().amax(-2))
    assert {s.rows for s in (found.norm, found.mean, found.range, found.moment)} == {x.shape[-2]}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_statistics_of_linear_layers(mean):
    model, batches = mlp(), [torch.randn(n, 5, 6) + mean for n in (1, 4, 2)]
    found = trine.calibrate(model, batches, everything)
    x = torch.cat(batches).flatten(0, 1)
    assert list(found) == ["0", "3"]
    assert_everything(found["0"], x)
    # In evaluation mode, batch by batch: the very values that the second layer gets.
    hidden = torch.cat([model[0](batch).relu().flatten(0, 1) for batch in batches]).detach()
    assert_everything(found["3"], hidden)


CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3),
    "strided": nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), bias=False),
    "dilated": nn.Conv2d(4, 6, 2, dilation=(2, 3), padding=2),
    "same": nn.Conv2d(4, 6, (3, 5), padding="same"),
    "mirrored": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_a_product_of_its_windows(name):
    layer, x = CONVOLUTIONS[name].double(), torch.randn(3, 4, 7, 8).double()
    product = layer_rows(layer, x) @ weight_matrix(layer).mT
    out = layer(x)
    if layer.bias is not None:
        out = out - layer.bias[:, None, None]
    if layer.groups > 1:
        product = product.transpose(0, 1).flatten(1)
    torch.testing.assert_close(product, out.permute(0, 2, 3, 1).flatten(0, 2))
    assert torch.equal(from_matrix(layer, weight_matrix(layer).clone()), layer.weight)
    found = trine.calibrate(layer, [x[:1], x[1:]], everything)[""]
    assert_everything(found, layer_rows(layer, x))


def test_conv1d_of_transformers():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer, x = Conv1D(5, 7), torch.randn(2, 3, 7)
    torch.testing.assert_close(
        layer_rows(layer, x) @ weight_matrix(layer).T, layer(x).flatten(0, 1)
    )
    assert torch.equal(from_matrix(layer, weight_matrix(layer).clone()), layer.weight)
    assert_everything(trine.calibrate(layer, x, everything)[""], x.flatten(0, 1))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, input_ids, attention_mask=None):
        return self.linear(self.table(input_ids))


def test_padding_does_not_count():
    model, ids = Words(), torch.randint(9, (2, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    found = trine.calibrate(model, batch, everything)["linear"]
    assert_everything(found, model.table(ids).detach()[mask == 1])


def test_every_form_of_data_is_read_alike():
    model, x = mlp(), torch.randn(6, 6)
    loader = DataLoader(TensorDataset(x), 2)
    forms = [x, (x,), {"input": x}, [x[:2], x[2:]], loader, (part for part in x.split(2))]
    for form in forms:
        found = trine.calibrate(model, form, SecondMoment, layers=["0"])["0"]
        torch.testing.assert_close(found.gram, x.T @ x)


def test_no_more_batches_than_asked_for_are_read():
    read, told = [], []

    def data():
        for i in range(9):
            read.append(i)
            yield torch.full((1, 6), float(i))

    found = trine.calibrate(
        mlp(), data(), ColumnNorm, layers=["0"], batches=3, progress=told.append
    )
    assert read == [0, 1, 2]
    assert told == [1, 2, 3]
    torch.testing.assert_close(found["0"].norm, torch.full((6,), 5.0**0.5).double())


def test_the_model_and_the_random_state_do_not_notice():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    model[1].eval()
    hooks_before = [dict(m._forward_pre_hooks) for m in model.modules()]
    state, modes = {k: v.clone() for k, v in model.state_dict().items()}, [True, True, False, True]
    loader = DataLoader(TensorDataset(torch.randn(8, 6)), 4, shuffle=True)
    random = torch.get_rng_state()
    trine.calibrate(model, loader, ColumnNorm)
    with pytest.raises(ValueError, match="NaN"):
        trine.calibrate(model, torch.full((2, 6), torch.nan), ColumnNorm)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert [dict(m._forward_pre_hooks) for m in model.modules()] == hooks_before
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x):
        return self.used(x)


class Diverges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.second(self.first(x) / 0)


X = torch.randn(2, 6)


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        (Branches(), X, {}, "none of the 1 batches reached layer 'idle'"),
        (Branches(), [], {}, "there is no data"),
        (Branches(), torch.empty(0, 6), {"layers": ["used"]}, "reached layer 'used'"),
        (Diverges(), X, {}, "input of layer 'second' holds NaN or infinity"),
        (Branches(), X, {"layers": ["other"]}, "no layer 'other'"),
        (Branches(), X, {"layers": "used"}, "must be a list of names"),
        (mlp(), X, {"layers": ["1"]}, "layer '1' is a ReLU"),
        (nn.ReLU(), X, {}, "there is no layer"),
        (Branches(), 3, {}, "data must be a batch"),
        (Branches(), [3], {}, "a batch must be a tensor"),
        (Branches(), [(X, X)], {}, r"what the model is called with and no labels"),
        (Branches(), X, {"batches": 0}, "batches is 0"),
        ("model", X, {}, "takes a torch.nn.Module; got str"),
    ],
)
@pytest.mark.parametrize("call", [trine.calibrate, lambda *a, **k: list(in_turn(*a, **k))])
def test_errors_are_one_sentence(call, model, data, options, message):
    with pytest.raises(ValueError, match=message):
        call(model, data, ColumnNorm, **options)


def test_attention_that_is_never_called_is_left_out():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = trine.calibrate(model, torch.randn(2, 3, 8), ColumnNorm)
    assert list(found) == ["linear1", "linear2"]


# ---- layer by layer ----


class Crossing(nn.Module):
    """Called in another order than named; two layers of one input; one called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.twice = nn.Linear(4, 2), nn.Linear(4, 4)
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.query(x) * self.key(x)
        return self.last(self.twice(self.twice(h)))


def test_layers_come_in_the_order_of_calls_and_see_what_was_changed():
    model, batches = Crossing().double(), [torch.randn(3, 4).double() for _ in range(2)]
    x, order, told = torch.cat(batches), [], []
    for name, layer, found in in_turn(model, iter(batches), everything, progress=told.append):
        order.append(name)
        assert layer is model.get_submodule(name)
        with torch.no_grad():
            h = model.query(x) * model.key(x)
            expected = {"query": x, "key": x, "last": model.twice(model.twice(h))}
            expected["twice"] = torch.cat((h, model.twice(h)))
            assert_everything(found, expected[name])
            layer.weight.mul_(torch.rand_like(layer.weight))
    assert order == ["query", "key", "twice", "last"]
    assert told == [1, 2, 3, 4]


# ---- the solver ----


class Keep:
    """Sets a fixed mask, and notes what it is shown."""

    def __init__(self, kept: torch.Tensor, group: int | None) -> None:
        self.kept, self.group = kept, group
        self.starts: list[int] = []
        self.seen: list[torch.Tensor] = []

    def start(self, first, weight, diagonal):
        self.starts.append(first)
        self.seen.append(weight)
        assert weight.shape[1] == diagonal.shape[0]

    def column(self, j, weight):
        return weight * self.kept[:, j]


def example(n: int = 5, k: int = 12, rows: int = 40):
    x = torch.randn(rows, k).double() @ torch.randn(k, k).double()
    return torch.randn(n, k).double(), x.T @ x


def naive(weight: torch.Tensor, hessian: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Each removal solved with a fresh inverse over the columns that are left."""
    result = weight.clone()
    for j in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[j:, j:])
        for row in range(weight.shape[0]):
            if not kept[row, j]:
                result[row, j:] -= result[row, j] / inverse[0, 0] * inverse[0]
                result[row, j] = 0
    return result


@pytest.mark.parametrize("block", [1, 4, 5, 12, 128])
@pytest.mark.parametrize("group", [4, 6, None])
def test_columns_are_those_of_a_loop_with_fresh_inverses(block, group):
    weight, gram = example()
    kept = torch.rand(5, 12) < 0.5
    rule = Keep(kept, group)
    found = solve_columns(weight, gram, rule, damping=0.02, block=block)
    hessian = gram + 0.02 * gram.diagonal().mean() * torch.eye(12).double()
    torch.testing.assert_close(found, naive(weight, hessian, kept), rtol=1e-9, atol=1e-9)
    assert (found[~kept] == 0).all()
    assert rule.starts == list(range(0, 12, group or 12))
    # A group sees the columns with every earlier error in: those of a loop that stops before it.
    for first, seen in zip(rule.starts, rule.seen, strict=True):
        until = kept.clone()
        until[:, first:] = True
        expected = naive(weight, hessian, until)[:, first : first + seen.shape[1]]
        torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-9)


def test_the_last_columns_are_the_best_there_are():
    """Only the first columns removed: the rest must solve the damped least squares exactly."""
    weight, gram = example()
    kept = torch.ones(5, 12, dtype=torch.bool)
    kept[:, :5] = False
    found = solve_columns(weight, gram, Keep(kept, None), damping=0.01)
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(12).double()
    # The minimum of (w - v) H (w - v)^T over v_5..: derivative 0 in those columns.
    torch.testing.assert_close(
        ((weight - found) @ hessian)[:, 5:].norm() / hessian.norm(),
        torch.tensor(0.0).double(),
        rtol=0,
        atol=1e-12,
    )


def test_the_inverse_factor_and_the_output_error():
    weight, gram = example()
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(12).double()
    factor = inverse_factor(gram)
    torch.testing.assert_close(factor.T @ factor @ hessian, torch.eye(12).double())
    assert torch.equal(factor, factor.triu())
    other, x = torch.randn(5, 12).double(), torch.randn(40, 12).double()
    error = output_error(weight, other, x.T @ x)
    torch.testing.assert_close(error, (x @ (weight - other).T).square().sum())


def test_a_column_without_data_changes_no_other():
    weight, gram = example()
    gram[3], gram[:, 3] = 0, 0
    kept = torch.ones(5, 12, dtype=torch.bool)
    kept[:, 3] = False
    found = solve_columns(weight, gram, Keep(kept, 4))
    assert torch.equal(found, weight * kept)


def test_narrow_weights_keep_their_dtype():
    weight, gram = example()
    kept = torch.rand(5, 12) < 0.5
    exact = solve_columns(weight, gram, Keep(kept, 4))
    for dtype in (torch.float32, torch.bfloat16):
        found = solve_columns(weight.to(dtype), gram.float(), Keep(kept, 4))
        assert found.dtype == dtype
        tolerance = 20 * torch.finfo(dtype).eps * exact.abs().max().item()
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance)


def test_bad_moments_are_refused():
    weight, gram = example()
    rule = Keep(torch.ones(5, 12), 4)
    with pytest.raises(ValueError, match="not positive definite"):
        solve_columns(weight, -gram, rule)
    with pytest.raises(ValueError, match="NaN"):
        solve_columns(weight, gram * torch.nan, rule)
    with pytest.raises(ValueError, match=r"needs second moments \[12, 12\]"):
        solve_columns(weight, gram[:5, :5], rule)
    with pytest.raises(ValueError, match="damping is -1"):
        solve_columns(weight, gram, rule, damping=-1)
    with pytest.raises(ValueError, match="block is 0"):
        solve_columns(weight, gram, rule, block=0)
