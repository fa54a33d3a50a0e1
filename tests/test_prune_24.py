"""Training to 2:4 and permuting channels for it, against their formulas by hand."""

import copy
from itertools import combinations

import pytest
import torch
import trine
from torch import nn
from trine.prune import (
    as_sparse24,
    attention_values,
    kept_magnitude,
    linked_channels,
    permute_for_24,
    search_permutation,
    sr_ste,
    trace,
    wanda,
)
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


# ---- the search for an order of columns ----


def kept_magnitude_by_hand(matrix: torch.Tensor) -> float:
    kept = kept_by_hand(matrix)
    return (matrix[kept].double().abs().sum() / matrix.double().abs().sum()).item()


@pytest.mark.parametrize("columns", [8, 10, 12])
def test_kept_magnitude(columns):
    matrix = torch.randn(7, columns)
    assert kept_magnitude(matrix) == pytest.approx(kept_magnitude_by_hand(matrix), rel=1e-12)
    assert kept_magnitude(torch.zeros(2, 8)) == 1


def best_of_all(matrix: torch.Tensor) -> float:
    """Over all divisions of twelve columns into three stripes."""
    best, columns = 0.0, range(12)
    for some in combinations(range(1, 12), 3):
        first = (0, *some)
        rest = [c for c in columns if c not in first]
        for others in combinations(rest[1:], 3):
            second = (rest[0], *others)
            third = [c for c in rest if c not in second]
            best = max(best, kept_magnitude(matrix[:, [*first, *second, *third]]))
    return best


@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_the_best_order_of_all(seed):
    matrix = torch.randn(6, 12, generator=torch.Generator().manual_seed(seed))
    told = []
    order = search_permutation(matrix, progress=told.append)
    assert sorted(order.tolist()) == list(range(12))
    assert kept_magnitude(matrix[:, order]) == pytest.approx(best_of_all(matrix), rel=1e-6)
    assert told == sorted(told)
    assert len(told) == 16


def test_the_search_undoes_the_worst_order():
    """Two large columns in each stripe keep nearly all; sorted by size they keep half."""
    matrix = torch.full((8, 32), 0.01)
    matrix[:, 16:] = 1 + torch.rand(8, 16)
    assert kept_magnitude(matrix) < 0.65
    assert kept_magnitude(matrix[:, search_permutation(matrix, escapes=0)]) > 0.98


def test_what_is_no_whole_stripe_stays_in_place():
    matrix = torch.randn(4, 11)
    assert search_permutation(matrix)[8:].tolist() == [8, 9, 10]
    assert search_permutation(matrix[:, :6]).tolist() == list(range(6))
    for wrong in (torch.randn(4), torch.full((4, 8), torch.nan)):
        with pytest.raises(ValueError, match="takes a finite matrix"):
            search_permutation(wrong)


# ---- whole networks in another order ----


def assert_same_function_and_more_kept(model, groups, *inputs, layers="*"):
    """The outputs up to rounding, and the kept magnitude reported as it is in the result."""
    before = copy.deepcopy(model.state_dict())
    permuted, kept = permute_for_24(model, groups, layers, escapes=2)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    for x in inputs:
        torch.testing.assert_close(permuted(x), model(x), rtol=1e-9, atol=1e-9)
    assert kept
    assert all(one.after > one.before for one in kept.values())
    return permuted, kept


def test_linear_activation_linear():
    model = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 9)).double().eval()
    x = torch.randn(5, 6).double()
    groups = trace(model, x)
    permuted, kept = assert_same_function_and_more_kept(model, groups, x)
    assert kept["0"].before == kept_magnitude(model[2].weight)
    assert kept["0"].after == kept_magnitude(permuted[2].weight)
    by_hand = [linked_channels(model, ["0"], ["2"])]
    again, kept_again = permute_for_24(model, by_hand, escapes=2)
    assert kept_again == kept
    assert torch.equal(again[0].bias, permuted[0].bias)
    # What 2:4 does afterwards loses less.
    served = as_sparse24(wanda(permuted.float(), x.float(), (2, 4), layers="2"), "2")
    assert kept_magnitude(served[2].dense_weight()) == 1


def test_norms_between_are_permuted_alike():
    model = nn.Sequential(
        nn.Linear(6, 16), nn.LayerNorm(16), nn.PReLU(16), nn.Linear(16, 5), nn.Linear(5, 3)
    )
    model = model.double()
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[2].weight)
    group = linked_channels(model, ["0"], ["3"], through=["1", "2"])
    assert_same_function_and_more_kept(model, [group], torch.randn(5, 6).double(), layers="3")


def test_chains_of_convolutions():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    for tensor in (*model[1].parameters(), *model[1].buffers()):
        if tensor.dim():
            nn.init.uniform_(tensor, 0.5, 2)
    model, x = model.double().eval(), torch.randn(2, 3, 8, 8).double()
    permuted, kept = assert_same_function_and_more_kept(model, trace(model, x), x)
    assert list(kept) == ["0"]  # a convolution of 1 x 1 alone reads channels in runs
    assert kept["0"].after == kept_magnitude(permuted[4].weight.flatten(1))


class Attention(nn.Module):
    """Grouped queries: four heads of eight channels, two of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(12, 32), nn.Linear(12, 16)
        self.value, self.output = nn.Linear(12, 16), nn.Linear(32, 12)

    def forward(self, x):
        heads = (
            layer(x).unflatten(-1, (-1, 8)).transpose(-2, -3)
            for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(*heads, enable_gqa=True)
        return self.output(mixed.transpose(-2, -3).flatten(-2))


def test_attention_values_within_their_heads():
    model, x = Attention().double(), torch.randn(2, 5, 12).double()
    groups = attention_values(model, "value", "output", 4, kv_heads=2)
    permuted, kept = assert_same_function_and_more_kept(model, groups, x)
    assert list(kept) == ["value#0", "value#1"]
    # Heads 0 and 1 read the first head of values: its eight channels, in one order for both.
    first = model.output.weight[:, :16].unflatten(1, (2, 8)).transpose(0, 1).flatten(0, 1)
    assert kept["value#0"].before == kept_magnitude(first)
    assert kept_magnitude(permuted.output.weight) > kept_magnitude(model.output.weight)


def test_fused_projections_of_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=20, n_positions=8)
    model = transformers.GPT2Model(config).double().eval()
    ids = torch.randint(20, (2, 6))
    attention = "h.0.attn."
    groups = attention_values(model, attention + "c_attn", attention + "c_proj", 2, first=32)
    groups.append(linked_channels(model, ["h.0.mlp.c_fc"], ["h.0.mlp.c_proj"]))
    permuted, kept = permute_for_24(model, groups, escapes=1)
    assert len(kept) == 3
    torch.testing.assert_close(
        permuted(ids).last_hidden_state, model(ids).last_hidden_state, rtol=1e-9, atol=1e-9
    )


def test_a_traced_encoder_with_its_residual_stream():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        vocab_size=30, max_position_embeddings=10,
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False).double().eval()
    ids = torch.randint(30, (2, 6))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 2)
    groups = trace(model, {"input_ids": ids})
    permuted, kept = permute_for_24(model, groups, "encoder.*", escapes=1)
    assert sum(name.endswith("intermediate.dense") for name in kept) == 2
    assert all(one.after > one.before for one in kept.values())
    torch.testing.assert_close(
        permuted(ids).last_hidden_state, model(ids).last_hidden_state, rtol=1e-9, atol=1e-9
    )


def test_what_cannot_be_permuted_is_refused():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
    group = linked_channels(model, ["0"], ["2"])
    with pytest.raises(ValueError, match="no chosen layer reads any of the groups"):
        permute_for_24(model, [group], "0")
    with pytest.raises(ValueError, match="no layer '7'"):
        linked_channels(model, ["0"], ["7"])
    with pytest.raises(ValueError, match="layer '1' must be"):
        linked_channels(model, ["0"], ["1"])
    with pytest.raises(ValueError, match="needs a layer that makes them"):
        linked_channels(model, [], ["2"])
    with pytest.raises(ValueError, match=r"holds 6 positions of dimension 1 of '2.weight'"):
        linked_channels(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(16, 5)), ["0"], ["2"])
    with pytest.raises(ValueError, match="not 3 heads with 3 of values"):
        attention_values(model, "0", "2", 3)
    model[2].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer '2' cannot be pruned: its weight holds NaN"):
        permute_for_24(model, [group])
