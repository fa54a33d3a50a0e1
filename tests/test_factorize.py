"""Low rank by singular values: what is best, by how much, and at which rank."""

import copy
import itertools

import numpy as np
import pytest
import torch
import transformers
import trine
from fake_timers import says
from torch import nn
from trine.calibration import SecondMoment
from trine.compress.edits import recorded
from trine.factorize import Energy, Parameters, Rank, Speedup, Svd, factorize
from trine.factorize.matrices import directions, factors
from trine.nn import Int8Linear, LowRankConv2d, LowRankLinear


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    layers = nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 32, bias=False), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(32, 20)).to(dtype)


def float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def slow(calls):
    """A timer that finds every factorised layer slower."""
    return {name: 1.0 if name == "float" else 2.0 for name in calls}


# ---- the best of a rank ----


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
@pytest.mark.parametrize("rank", [1, 5, 7])
def test_svd_is_as_good_as_eckart_and_young_say(shape, rank):
    layer = nn.Linear(*shape)
    weight = float64(layer.weight)
    s = np.linalg.svd(weight, compute_uv=False)
    model = nn.Sequential(layer)
    small = factorize(model, Rank(rank))
    product = float64(small[0].second.weight) @ float64(small[0].first.weight)
    error = np.linalg.norm(weight - product)
    np.testing.assert_allclose(error, np.sqrt((s[rank:] ** 2).sum()), rtol=1e-6)
    assert np.linalg.matrix_rank(product, tol=1e-6) == rank
    reported = small.report.layers[0].error
    np.testing.assert_allclose(reported, error / np.linalg.norm(weight), rtol=1e-6)
    assert small[0].bias is not layer.bias
    assert torch.equal(small[0].bias, layer.bias)


def test_calibrated_svd_is_the_best_for_the_outputs():
    """Against the formula with the inverse of a Cholesky factor, gradient descent, and chance."""
    torch.manual_seed(0)
    mixing = torch.randn(24, 24) * torch.logspace(0, -2, 24)
    model, x = mlp(), torch.randn(200, 24) @ mixing
    moments = trine.calibrate(model, [x[:90], x[90:]], lambda: SecondMoment(torch.float64))
    small = factorize(model, Rank(6), Svd(moments), layers="0")
    weight, rows = float64(model[0].weight), float64(x)

    root = np.linalg.cholesky(rows.T @ rows)  # X^T X = L L^T, ||X D^T||_F = ||D L||_F
    u, s, v = np.linalg.svd(weight @ root, full_matrices=False)
    best = u[:, :6] * s[:6] @ v[:6] @ np.linalg.inv(root)
    ours = float64(small[0].weight)
    np.testing.assert_allclose(ours, best, atol=1e-5)

    error = np.linalg.norm(rows @ (weight - ours).T)
    np.testing.assert_allclose(error, np.sqrt((s[6:] ** 2).sum()), rtol=1e-5)
    reported = small.report.layers[0].error
    np.testing.assert_allclose(reported, error / np.linalg.norm(rows @ weight.T), rtol=1e-5)
    plain = float64(factorize(model, Rank(6), layers="0")[0].weight)
    assert error < 0.8 * np.linalg.norm(rows @ (weight - plain).T)

    wide, root = torch.from_numpy(weight), torch.from_numpy(root)
    a, b = (f.double().clone() for f in (small[0].second.weight.data, small[0].first.weight.data))

    def loss(a, b):
        return ((wide - a @ b) @ root).norm()

    for _ in range(20):
        step = 1e-3 * torch.randn_like(a), 1e-3 * torch.randn_like(b)
        assert loss(a + step[0], b + step[1]) > error
    a, b = torch.randn_like(a).requires_grad_(), torch.randn_like(b).requires_grad_()
    optimizer = torch.optim.LBFGS([a, b], max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(a, b) ** 2
        value.backward()
        return value

    optimizer.step(closure)
    assert error * (1 - 1e-6) < loss(a, b).item() < error * 1.03


def test_inputs_without_some_directions_are_no_special_case():
    x = torch.randn(50, 8) @ torch.randn(8, 24)  # X^T X has rank 8
    model = mlp()
    moments = trine.calibrate(model, x, SecondMoment)
    small = factorize(model, Rank(8), Svd(moments), layers="0")
    torch.testing.assert_close(small[0](x), model[0](x), rtol=1e-3, atol=1e-3)


def test_factors_share_the_size_between_them():
    weight = torch.randn(12, 9)
    u, _ = directions(weight)
    second, first = factors(weight, u[:, :4])
    torch.testing.assert_close(second.norm(dim=0), first.norm(dim=1))
    second, first = factors(torch.zeros(12, 9), u[:, :4])
    assert (second @ first == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_factors_have_the_layers_dtype_and_mode(dtype):
    model = mlp(dtype).eval()
    small = factorize(model, Rank(4))
    assert small[2].first.weight.dtype == small[2].weight.dtype == small[4].bias.dtype == dtype
    assert not any(module.training for module in small.modules())
    assert small[2].bias is None
    assert small(torch.randn(3, 24, dtype=dtype)).dtype == dtype
    assert all(module.training for module in factorize(mlp().train(), Rank(4)).modules())


def test_a_transposed_layer_of_transformers():
    torch.manual_seed(0)
    layer = transformers.pytorch_utils.Conv1D(12, 30)
    small = factorize(nn.Sequential(layer), Rank(5))
    u, s, v = np.linalg.svd(float64(layer.weight.T), full_matrices=False)
    best = torch.from_numpy(u[:, :5] * s[:5] @ v[:5]).float()
    x = torch.randn(2, 3, 30)
    torch.testing.assert_close(small(x), x @ best.T + layer.bias)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": (1, 2)}])
def test_a_convolution_becomes_one_with_fewer_outputs_and_a_1x1(options):
    layer = nn.Conv2d(6, 20, (3, 2), **options)
    model, x = nn.Sequential(layer), torch.randn(2, 6, 9, 9)
    small = factorize(model, Rank(7))
    matrix = float64(layer.weight).reshape(20, -1)
    s = np.linalg.svd(matrix, compute_uv=False)
    error = np.linalg.norm(matrix - float64(small[0].weight).reshape(20, -1))
    np.testing.assert_allclose(error, np.sqrt((s[7:] ** 2).sum()), rtol=1e-5)
    as_one = copy.deepcopy(layer)
    as_one.weight.data = small[0].weight.detach()
    torch.testing.assert_close(small(x), as_one(x))
    assert isinstance(small[0], LowRankConv2d)


def test_a_calibrated_convolution_is_the_best_for_its_outputs():
    layer = nn.Conv2d(4, 16, 3, padding=1)
    model, x = nn.Sequential(layer), torch.randn(3, 4, 6, 6).cumsum(-1)
    moments = trine.calibrate(model, x, SecondMoment)
    errors = [
        (factorize(model, Rank(5), method)(x) - model(x)).norm() for method in (Svd(moments), Svd())
    ]
    outputs = (model(x) - layer.bias[:, None, None]).transpose(0, 1).flatten(1)
    s = np.linalg.svd(float64(outputs), compute_uv=False)
    np.testing.assert_allclose(errors[0].item(), np.sqrt((s[5:] ** 2).sum()), rtol=1e-4)
    assert errors[0] < errors[1]


# ---- ranks ----


@pytest.mark.parametrize("share", [0.5, 0.8, 0.99])
def test_energy_takes_the_least_rank_that_keeps_it(share):
    model = mlp()
    small = factorize(model, Energy(share))
    for name in "024":
        squares = np.linalg.svd(float64(model[int(name)].weight), compute_uv=False) ** 2
        kept = squares.cumsum() / squares.sum()
        rank = int((kept < share).sum()) + 1
        n, k = model[int(name)].weight.shape
        if rank * (n + k) < n * k:
            assert small[int(name)].rank == rank
        else:
            assert small[int(name)].weight is not None
            assert isinstance(small[int(name)], nn.Linear)


def loss_of(weight: np.ndarray, rank: int | None) -> float:
    squares = np.linalg.svd(weight, compute_uv=False) ** 2
    return 0.0 if rank is None else weight.size * squares[rank:].sum() / squares.sum()


@pytest.mark.parametrize("share", [0.3, 0.55, 0.8])
def test_parameters_are_spread_so_that_least_is_lost(share):
    """No choice of as many parameters is better: all of them are tried."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 10), nn.Linear(10, 6), nn.Linear(6, 12))
    model[1].weight.data = torch.outer(torch.randn(6), torch.randn(10)) + 0.1 * torch.randn(6, 10)
    small = factorize(model, Parameters(share))
    weights = [float64(layer.weight) for layer in model]

    def size(weight, rank):
        return weight.size if rank is None else rank * sum(weight.shape)

    options = [
        [None, *(r for r in range(1, min(w.shape) + 1) if size(w, r) < w.size)] for w in weights
    ]
    chosen = [getattr(layer, "rank", None) for layer in small]
    used = sum(map(size, weights, chosen))
    assert used <= share * sum(w.size for w in weights)
    best = min(
        sum(map(loss_of, weights, choice))
        for choice in itertools.product(*options)
        if sum(map(size, weights, choice)) <= used
    )
    np.testing.assert_allclose(sum(map(loss_of, weights, chosen)), best, atol=1e-12)
    assert small[1].rank == 1  # where it loses least


def test_speedup_takes_the_largest_rank_that_is_fast_enough():
    tried = []

    def timer(calls):
        """Twice as fast as float at rank 24."""
        layer = calls["factorised"].__closure__[0].cell_contents
        tried.append(layer.rank)
        return {"float": 48.0, "factorised": float(layer.rank)}

    model = nn.Sequential(nn.Linear(96, 128))
    x = torch.randn(4, 96)
    assert factorize(model, Speedup(2), sample_inputs=x, timer=timer)[0].rank == 24
    assert len(tried) <= 4
    assert factorize(model, Speedup(1.9, 1), sample_inputs=x, timer=timer)[0].rank == 25
    slowest = factorize(model, Speedup(50), sample_inputs=x, timer=timer)
    assert slowest.report.layers[0].reason == "no rank is worth it"
    with pytest.raises(ValueError, match="Speedup measures; give factorize sample_inputs"):
        factorize(model, Speedup(2))


def test_the_original_stays_where_it_is_faster_or_smaller():
    model, x = mlp(), torch.randn(5, 24)
    small = factorize(model, Rank(4), sample_inputs=x, timer=slow)
    assert small.report.changed == 0
    assert "measured 0.50 times as fast" in str(small.report)
    assert torch.equal(small(x), model(x))
    small = factorize(model, Rank(4), sample_inputs=x, timer=says(2.0))
    assert small.report.changed == 3
    assert small.report.layers[0].ratio == 2.0
    small = factorize(model, Rank(16))
    assert small.report.layers[0].reason == "rank 16 takes 1024 parameters, the layer 960"
    assert small.report.layers[2].bytes_after == small.report.layers[2].bytes_before
    assert "2 of 3" not in str(small.report)


def test_layers_are_chosen_by_their_names():
    model = mlp()
    small = factorize(model, Rank(4), layers=["0", "4"], skip="4")
    assert [row.name for row in small.report.layers] == ["0"]
    assert isinstance(small[2], nn.Linear)


# ---- composing ----


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(24, 40), nn.Linear(40, 20)
        self.patch = nn.Conv2d(1, 16, 2)

    def forward(self, x):
        return self.head(torch.relu(self.body(x))) + self.patch(x[None, None, :2]).mean()


@pytest.mark.parametrize("build", [mlp, Net])
@pytest.mark.parametrize("choice", [None, "int8", "ternary"])
def test_saved_loaded_and_quantised(tmp_path, build, choice):
    model, x = build().eval(), torch.randn(3, 24)
    small = factorize(model, Rank(4))
    if choice:
        small = trine.compress(small, trine.Recipe(choice), x, timer=says(2))
        assert small.report.swapped >= 4
    trine.save(small, tmp_path / "a.trine")
    again = trine.load(tmp_path / "a.trine", like=build if build is Net else None)
    assert torch.equal(again(x), small(x))
    torch.testing.assert_close(again.state_dict(), small.state_dict(), rtol=0, atol=0)


def test_a_model_of_transformers_is_factorised_quantised_saved_and_loaded(tmp_path):
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model, tokens = transformers.BertModel(config).eval(), torch.arange(8)[None]
    factored = factorize(model, Rank(6), layers="encoder.*")
    assert factored.report.changed == 12
    small = trine.compress(factored, trine.Recipe("int8"), tokens, timer=says(2))
    assert isinstance(small.encoder.layer[1].intermediate.dense.first, Int8Linear)
    for each in (factored, small):
        trine.save(each, tmp_path / "a.trine")
        for changed in (each, trine.load(tmp_path / "a.trine")):
            with pytest.raises(ValueError, match="could not read what save_pretrained would write"):
                changed.save_pretrained(tmp_path / "folder")
    trine.save(small, tmp_path / "a.trine")
    again = trine.load(tmp_path / "a.trine")
    assert isinstance(again.encoder.layer[0].output.dense, LowRankLinear)
    assert torch.equal(again(tokens)[0], small(tokens)[0])


def test_a_factorised_layer_of_torchs_encoder_is_called():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1).eval()
    small, x = factorize(model, Rank(2)), torch.randn(2, 5, 16)
    assert isinstance(small.layers[0].linear1, LowRankLinear)
    reasons = {row.name: row.reason for row in small.report.layers}
    assert "MultiheadAttention" in reasons["layers.0.self_attn.out_proj"]
    with torch.no_grad():
        expected = copy.deepcopy(model)
        for name in ("linear1", "linear2"):
            weight = getattr(small.layers[0], name).dense_weight()
            getattr(expected.layers[0], name).weight.data = weight
        torch.testing.assert_close(small(x), expected(x), rtol=1e-4, atol=1e-5)


def test_factors_train():
    model, x = mlp(), torch.randn(64, 24)
    y = model(x).detach()
    small = factorize(model, Rank(3))
    optimizer = torch.optim.Adam(small.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = (small(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in small.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_the_model_is_not_touched():
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    small = factorize(model, Parameters(0.5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not hasattr(model, "report")
    assert recorded(model) == []
    assert small[1] is not model[1]
    done = []
    factorize(model, Rank(2), progress=done.append)
    assert done == [1, 2, 3, 4, 5, 6]


# ---- what cannot be ----


def with_nan() -> nn.Module:
    model = mlp()
    model[2].weight.data[3, 4] = torch.nan
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("build", "call", "message"),
    [
        (mlp, lambda m: factorize(m, Rank(0)), "layer '0': rank 0 is not a whole number from 1 to"),
        (mlp, lambda m: factorize(m, Rank(25)), "layer '0': rank 25 .* from 1 to 24"),
        (mlp, lambda m: factorize(m, Rank(2.0)), "layer '0': rank 2.0 is not a whole number"),
        (mlp, lambda m: factorize(m, Rank((2, 2))), r"layer '0': rank \(2, 2\) is not a whole"),
        (mlp, lambda m: factorize(m, Energy(0)), "Energy: the share is 0"),
        (mlp, lambda m: factorize(m, Energy(1.2)), "Energy: the share is 1.2"),
        (mlp, lambda m: factorize(m, Parameters(1)), "Parameters: the share is 1"),
        (mlp, lambda m: factorize(m, Parameters(0.01)), "give at least 0.0653"),
        (mlp, lambda m: factorize(m, Speedup(0.5)), "the ratio must be above 1"),
        (mlp, lambda m: factorize(m, Rank(2), layers="7"), "is named '7'; there are: '0', '2'"),
        (mlp, lambda m: factorize(m, Rank(2), skip="*"), "no layer is left"),
        (mlp, lambda m: factorize(m, Rank(2), Svd({})), "no second moment of layer '0'"),
        (
            mlp,
            lambda m: factorize(m, Rank(2), sample_inputs=[]),
            "sample_inputs is an empty list",
        ),
        (with_nan, lambda m: factorize(m, Rank(2)), "weight of layer '2' holds NaN"),
        (
            tied,
            lambda m: factorize(m, Rank(2), layers="1"),
            "layer '1' cannot be changed: .*shared",
        ),
        (
            lambda: nn.Sequential(nn.Linear(0, 4)),
            lambda m: factorize(m, Rank(1)),
            "'0': its weight is empty",
        ),
        (lambda: nn.Sequential(nn.ReLU()), lambda m: factorize(m, Rank(1)), "there are: none"),
        (lambda: mlp().to("meta"), lambda m: factorize(m, Rank(1)), "'0' is on the meta device"),
        (
            lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)),
            lambda m: factorize(m, Rank(1)),
            "'0': it has 2 groups",
        ),
        (lambda: 3, lambda m: factorize(m, Rank(1)), "factorize takes a torch.nn.Module; got int"),
    ],
)
def test_what_cannot_be_is_said(build, call, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        call(model)
    assert not hasattr(model, "report")


def test_a_moment_of_another_model_is_refused():
    moments = trine.calibrate(nn.Sequential(nn.Linear(5, 5)), torch.randn(4, 5), SecondMoment)
    with pytest.raises(ValueError, match=r"moment of layer '0' is \[5, 5\], .* 24 columns"):
        factorize(mlp(), Rank(2), Svd(moments), layers="0")


def test_tied_layers_stay_and_the_others_change():
    small = factorize(tied(), Rank(2))
    assert [row.changed for row in small.report.layers] == [False, False, True]
    assert small[0].weight is small[1].weight
    assert "shared with another module" in small.report.layers[0].reason


def test_a_report_of_the_users_is_not_lost():
    model = mlp()
    model.report = "mine"
    with pytest.raises(ValueError, match="factorize puts its report into the attribute"):
        factorize(model, Rank(2))
    twice = factorize(factorize(mlp(), Rank(4), layers="0"), Rank(2), layers="*first")
    assert isinstance(twice[0].first, LowRankLinear)


def test_low_rank_layers_check_their_rank():
    with pytest.raises(ValueError, match="rank is 0; it must be at least 1"):
        LowRankLinear(4, 4, 0)
