"""Weights in common: layers that share them, factorised embeddings, k-means codebooks."""

import copy

import numpy as np
import pytest
import safetensors
import torch
import transformers
import trine
from fake_timers import says
from torch import nn
from trine.factorize import (
    Energy,
    Parameters,
    Rank,
    cluster,
    decoded,
    factorize_embedding,
    share_layers,
)
from trine.factorize.clustering import kmeans
from trine.nn import ClusteredEmbedding, ClusteredLinear, LowRankEmbedding, LowRankLinear
from trine.nn.clustered import pack_codes, unpack_codes

TOKENS = torch.arange(12).reshape(2, 6)


def bert(layers: int = 4) -> nn.Module:
    config = transformers.BertConfig(
        num_hidden_layers=layers,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=50,
    )
    return transformers.BertModel(config).eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_layer=4, n_embd=32, n_head=4, vocab_size=60, n_positions=20)
    return transformers.GPT2LMHeadModel(config).eval()


def float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def assert_saved(model: nn.Module, path, run=lambda m: m(TOKENS)[0]) -> nn.Module:
    trine.save(model, path)
    again = trine.load(path)
    with torch.inference_mode():
        assert torch.equal(run(again), run(model))
    return again


# ---- shared layers ----


def test_shared_weights_are_the_mean_and_stored_once(tmp_path):
    model = bert()
    small = share_layers(model, "encoder.layer", 2)
    layers, originals = small.encoder.layer, model.encoder.layer
    for first, group in ((0, (0, 1)), (2, (2, 3))):
        for name, parameter in layers[first].named_parameters():
            mean = np.mean([float64(originals[i].get_parameter(name)) for i in group], axis=0)
            np.testing.assert_allclose(float64(parameter), mean, atol=1e-7)
            assert all(layers[i].get_parameter(name) is parameter for i in group)
    assert layers[0].output.dense is not layers[2].output.dense
    assert small.report.layers[0].bytes_after * 2 == small.report.layers[0].bytes_before
    before = copy.deepcopy(bert().state_dict()).keys()
    assert model.state_dict().keys() == before
    again = assert_saved(small, tmp_path / "a.trine")
    assert again.encoder.layer[0].output.dense is again.encoder.layer[1].output.dense
    with safetensors.safe_open(tmp_path / "a.trine", "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    of_a_layer = small.report.layers[0].bytes_after
    assert small.report.model_bytes_before - small.report.model_bytes_after == 2 * of_a_layer
    assert stored == small.report.model_bytes_after


def test_equal_layers_compute_the_same_when_shared():
    model = bert()
    for layer in model.encoder.layer[1:]:
        layer.load_state_dict(model.encoder.layer[0].state_dict())
    small = share_layers(model, "encoder.layer")
    assert torch.equal(small(TOKENS)[0], model(TOKENS)[0])
    small(TOKENS)[0].sum().backward()
    shared = small.encoder.layer[0].output.dense.weight
    model(TOKENS)[0].sum().backward()
    total = sum(layer.output.dense.weight.grad for layer in model.encoder.layer)
    torch.testing.assert_close(shared.grad, total)


def test_a_shared_model_writes_with_a_cache_is_quantised_and_saved(tmp_path):
    """Layers keep their own number in the cache of keys and values."""
    small = share_layers(gpt2(), "transformer.h", [[0, 1], [2, 3]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    written = [small.generate(TOKENS, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*written)
    small = trine.compress(small, trine.Recipe("int8"), TOKENS, timer=says(2))
    assert small.report.swapped == 8
    assert small.transformer.h[0].mlp.c_fc is small.transformer.h[1].mlp.c_fc
    again = assert_saved(small, tmp_path / "a.trine")
    assert torch.equal(again.generate(TOKENS, **options), small.generate(TOKENS, **options))
    with pytest.raises(ValueError, match=r"use trine\.save and trine\.load"):
        small.save_pretrained(tmp_path)


class Stack(nn.Module):
    """Of the user's own; its layers hold parameters beside their children."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.norm(self.linear(x)) * self.scale


def test_statistics_stay_with_each_layer(tmp_path):
    model, x = Stack().eval(), torch.randn(4, 6)
    model.blocks[1].norm.running_mean += 1
    small = share_layers(model, "blocks")
    first, second = small.blocks[0], small.blocks[1]
    assert first.linear is second.linear
    assert first.scale is second.scale
    assert first.norm.weight is second.norm.weight
    assert not torch.equal(first.norm.running_mean, second.norm.running_mean)
    trine.save(small, tmp_path / "a.trine")
    assert torch.equal(trine.load(tmp_path / "a.trine", like=Stack)(x), small(x))


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (bert, ("encoder",), "'encoder' is no nn.ModuleList"),
        (bert, ("nothing",), "'nothing' is no nn.ModuleList"),
        (bert, ("encoder.layer", 0), "0 groups of 4 layers cannot be made"),
        (bert, ("encoder.layer", 5), "5 groups of 4 layers cannot be made"),
        (bert, ("encoder.layer", [[0, 4]]), "layers from 0 to 3"),
        (bert, ("encoder.layer", [[0, 1], [1, 2]]), "at most once"),
        (
            lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5))),
            ("0",),
            "layers 0 and 1 are not of one form",
        ),
        (
            lambda: share_layers(bert(), "encoder.layer"),
            ("encoder.layer",),
            "layer 1 shares weights with one before it",
        ),
    ],
)
def test_what_cannot_be_shared_is_said(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        share_layers(build(), *arguments)


def test_nan_is_not_averaged():
    model = bert()
    model.encoder.layer[2].output.dense.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weights of layer 2 hold NaN"):
        share_layers(model, "encoder.layer")


# ---- embeddings ----


def test_an_embedding_is_the_best_of_its_rank(tmp_path):
    model = bert()
    table = float64(model.embeddings.word_embeddings.weight)
    s = np.linalg.svd(table, compute_uv=False)
    small = factorize_embedding(model, "embeddings.word_embeddings", Rank(5))
    made = small.embeddings.word_embeddings
    assert isinstance(made, LowRankEmbedding)
    assert (made(torch.tensor([0])) == 0).all()  # the row of padding
    error = np.linalg.norm(table - float64(made.weight))
    np.testing.assert_allclose(error, np.sqrt((s[5:] ** 2).sum()), rtol=1e-5)
    np.testing.assert_allclose(
        small.report.layers[0].error, error / np.linalg.norm(table), rtol=1e-5
    )
    torch.testing.assert_close(made(TOKENS), made.weight[TOKENS])
    again = assert_saved(small, tmp_path / "a.trine")
    assert again.embeddings.word_embeddings.padding_idx == 0
    small(TOKENS)[0].sum().backward()
    assert made.embedding.weight.grad is not None


def test_a_tied_head_is_the_same_product(tmp_path):
    model = gpt2()
    small = factorize_embedding(model, "transformer.wte", Rank(8))
    table, head = small.transformer.wte, small.lm_head
    assert isinstance(head, LowRankLinear)
    assert head.second.weight is table.embedding.weight
    torch.testing.assert_close(head.dense_weight(), table.weight)
    dense = gpt2()
    dense.load_state_dict(model.state_dict())
    dense.transformer.wte.weight.data = table.weight.detach()
    torch.testing.assert_close(small(TOKENS)[0], dense(TOKENS)[0], rtol=1e-4, atol=1e-5)
    row = small.report.layers[0]
    assert row.reason == "rank 8, with 'lm_head'"
    assert (row.bytes_before, row.bytes_after) == (60 * 32 * 4, (60 * 8 + 2 * 8 * 32) * 4)
    again = assert_saved(small, tmp_path / "a.trine")
    assert again.lm_head.second.weight is again.transformer.wte.embedding.weight
    assert model.lm_head.weight is model.transformer.wte.weight


def test_the_rank_of_an_embedding_by_energy_or_parameters():
    model = nn.Sequential(nn.Embedding(40, 12))
    squares = np.linalg.svd(float64(model[0].weight), compute_uv=False) ** 2
    kept = squares.cumsum() / squares.sum()
    small = factorize_embedding(model, "0", Energy(0.6))
    assert small[0].rank == int((kept < 0.6).sum()) + 1
    small = factorize_embedding(model, "0", Parameters(0.5))
    assert small[0].rank == int(0.5 * 40 * 12) // 52


def tied_to_something() -> nn.Module:
    model = nn.Sequential(nn.Embedding(4, 4), nn.PReLU(4))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("build", "name", "rank", "message"),
    [
        (bert, "embeddings", 2, "'embeddings' is BertEmbeddings; it must be an nn.Embedding"),
        (bert, "no", 2, "'no' is NoneType"),
        (bert, "embeddings.word_embeddings", 17, "rank 17 is not a whole number from 1 to 16"),
        (bert, "embeddings.word_embeddings", 13, "rank 13 would take 858 parameters, the table"),
        (tied_to_something, "0", 1, "is tied to 'weight' of '1', a PReLU"),
        (lambda: nn.Sequential(nn.Embedding(9, 9, max_norm=1.0)), "0", 2, "'0' has max_norm"),
    ],
)
def test_what_cannot_be_an_embedding_is_said(build, name, rank, message):
    with pytest.raises(ValueError, match=message):
        factorize_embedding(build(), name, Rank(rank))


# ---- codebooks ----


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_packed_and_come_back(bits):
    codes = torch.randint(2**bits, (3, 21))
    packed = pack_codes(codes, bits)
    assert packed.shape == (3, 3 * bits)
    as_bits = np.unpackbits(packed.numpy(), axis=1, bitorder="little")
    by_hand = as_bits[:, : 21 * bits].reshape(3, 21, bits) @ (1 << np.arange(bits))
    assert (by_hand == codes.numpy()).all()
    assert torch.equal(unpack_codes(packed, 21, bits), codes)


@pytest.mark.parametrize("group", [1, 3])
def test_kmeans_rests_where_centroids_are_means_of_what_is_nearest(group):
    points = torch.randn(600, group)
    centroids, nearest = kmeans(points, 8, 200)
    wide, places = float64(points), float64(centroids)
    distances = ((wide[:, None] - places[None]) ** 2).sum(2)
    np.testing.assert_allclose(
        distances.min(1), distances[np.arange(600), nearest.numpy()], atol=1e-9
    )
    for number in range(8):
        members = wide[nearest.numpy() == number]
        assert len(members)
        np.testing.assert_allclose(places[number], members.mean(0), atol=1e-5)
    errors = []
    for turns in (1, 3, 10, 200):
        found, at = kmeans(points, 8, turns)
        errors.append((points - found[at]).square().sum().item())
    assert errors == sorted(errors, reverse=True)


def test_fewer_values_than_centroids_are_kept_exactly():
    points = torch.tensor([[0.5], [-1.0], [0.5], [2.0]])
    centroids, nearest = kmeans(points, 8, 10)
    assert torch.equal(centroids[nearest], points)


@pytest.mark.parametrize("group", [1, 4])
def test_clustered_layers_are_small_and_compute_with_their_values(tmp_path, group):
    model = bert(1)
    small = cluster(model, 3, group=group, skip="pooler*")
    dense, made = model.encoder.layer[0].output.dense, small.encoder.layer[0].output.dense
    assert isinstance(made, ClusteredLinear)
    assert isinstance(small.embeddings.word_embeddings, ClusteredEmbedding)
    assert len(made.weight.reshape(-1, group).unique(dim=0)) <= 8
    assert made.codes.shape == (16, -(-24 // group // 8) * 3)
    error = (dense.weight - made.weight).norm() / dense.weight.norm()
    row = next(r for r in small.report.layers if r.name == "encoder.layer.0.output.dense")
    np.testing.assert_allclose(row.error, error.item(), rtol=1e-5)
    assert error < (0.35 if group == 1 else 0.9)
    assert_saved(small, tmp_path / "a.trine")

    again = decoded(small)
    assert type(again.encoder.layer[0].output.dense) is nn.Linear
    with torch.inference_mode():
        torch.testing.assert_close(again(TOKENS)[0], small(TOKENS)[0])
    assert_saved(again, tmp_path / "b.trine")


def test_four_bits_take_an_eighth_on_disk(tmp_path):
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    sizes = []
    for each in (model, cluster(model, 4)):
        trine.save(each, tmp_path / "a.trine")
        sizes.append((tmp_path / "a.trine").stat().st_size)
    assert sizes[1] < sizes[0] / 7


def test_the_gradient_of_a_value_is_the_sum_of_those_of_its_weights():
    model, x = nn.Sequential(nn.Linear(20, 30)), torch.randn(7, 20)
    small = cluster(model, 2)
    codes = unpack_codes(small[0].codes, 20, 2).numpy()
    weight = small[0].weight.detach().requires_grad_()
    nn.functional.linear(x, weight, small[0].bias).square().sum().backward()
    small(x).square().sum().backward()
    by_hand = [float64(weight.grad)[codes == number].sum() for number in range(4)]
    np.testing.assert_allclose(float64(small[0].codebook.grad)[:, 0], by_hand, rtol=1e-4)


def test_a_transposed_layer_is_clustered():
    model = gpt2()
    small = cluster(model, 8, layers="*.c_fc")
    x = torch.randn(3, 32)
    made, layer = small.transformer.h[0].mlp.c_fc, model.transformer.h[0].mlp.c_fc
    torch.testing.assert_close(made(x), layer(x), atol=0.02, rtol=0.02)


def with_nan() -> nn.Module:
    model = nn.Sequential(nn.Linear(50, 50))
    model[0].weight.data[0, 0] = torch.inf
    return model


@pytest.mark.parametrize(
    ("build", "call", "message"),
    [
        (bert, lambda m: cluster(m, 0), "bits is 0"),
        (bert, lambda m: cluster(m, 9), "bits is 9"),
        (bert, lambda m: cluster(m, 4, group=0), "group is 0"),
        (with_nan, lambda m: cluster(m, 2), "weight of layer '0' holds NaN or infinity"),
        (gpt2, lambda m: cluster(m, 4, layers="lm_head"), "layer 'lm_head' cannot be changed"),
        (bert, decoded, "the model holds no clustered layer"),
        (bert, lambda m: ClusteredLinear(10, 4, 2, 3), "group is 3; it must divide the 10 columns"),
        (bert, lambda m: ClusteredLinear(10, 4, 9), "bits is 9; it must be from 1 to 8"),
        (bert, lambda m: LowRankEmbedding(10, 4, 0), "rank is 0"),
    ],
)
def test_what_cannot_be_clustered_is_said(build, call, message):
    with pytest.raises(ValueError, match=message):
        call(build())


def test_layers_that_would_not_shrink_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(50, 50))
    small = cluster(model, 8)
    assert [row.changed for row in small.report.layers] == [False, True]
    assert "codes and codebook would take" in small.report.layers[0].reason
    small = cluster(model, 2, group=5)
    assert small.report.layers[0].reason == "5 does not divide its 4 columns"
