"""Structured pruning: what is left computes what the whole computes with zeros in its place."""

import copy

import pytest
import torch
import trine
from structured_models import CASES, call, case, masked
from structured_modules import MODULES
from torch import Tensor, nn
from trine.prune import (
    Magnitude,
    Neuron,
    PerLayer,
    Pruner,
    Random,
    drop_layers,
    hand_over,
    macs,
    prune_structured,
    remove,
    trace,
)

ALL = sorted(CASES)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # these models are too small for more


def removed(small: nn.Module) -> dict[str, tuple[int, ...]]:
    return {g.name: g.removed for g in small.removal_report.groups if g.kind != "hidden"}


@pytest.mark.parametrize("name", ALL)
def test_removing_is_zeroing(name):
    found = case(name)
    small = prune_structured(found.model, found.inputs, 0.4, multiple_of=1)
    assert removed(small).keys() == found.readers.keys()
    for group in small.removal_report.groups:
        assert len(group.removed) == (int(0.4 * group.before) if group.kind != "hidden" else 0)
    expected = masked(found, removed(small))
    assert not torch.allclose(expected, call(found.model, found.inputs), rtol=1e-3)
    torch.testing.assert_close(call(small, found.inputs), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", MODULES, ids=lambda make: make.__name__)
def test_every_coupling(make):
    torch.manual_seed(0)
    found = make()
    found.model.double().eval()
    found.inputs = found.inputs.double()
    before = call(found.model, found.inputs)
    assert set(trace(found.model, found.inputs)) == found.readers.keys()
    small = prune_structured(found.model, found.inputs, 0.4, importance=Random(), multiple_of=1)
    assert all(removed(small).values())
    expected = masked(found, removed(small))
    assert not torch.allclose(expected, before, rtol=1e-3)
    torch.testing.assert_close(call(small, found.inputs), expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(call(found.model, found.inputs), before)


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit"])
def test_hidden_width_leaves_the_norms_out(name):
    """The reference is the whole model whose norms see the features that are left, and no others;
    all that reads the stream reads it through a norm."""
    found = case(name)
    small = prune_structured(found.model, found.inputs, 0.25, kinds="hidden")
    group = next(g for g in small.removal_report.groups if g.kind == "hidden")
    assert (group.before, group.after) == (32, 24)
    kept = [i for i in range(32) if i not in group.removed]

    def norm(module, args, _):
        x = args[0][..., kept]
        if isinstance(module, nn.LayerNorm):
            x = x - x.sum(-1, keepdim=True) / 24
        eps = getattr(module, "eps", None) or module.variance_epsilon
        x = x / ((x * x).sum(-1, keepdim=True) / 24 + eps).sqrt() * module.weight[kept]
        if isinstance(module, nn.LayerNorm):
            x = x + module.bias[kept]
        return torch.zeros_like(args[0]).index_copy(-1, torch.tensor(kept), x)

    for module in found.model.modules():
        if "Norm" in type(module).__name__:
            module.register_forward_hook(norm)
    expected = call(found.model, found.inputs)
    # Llama's norm squares in float32, whatever it is given.
    exact = 1e-10 if name != "llama" else 1e-5
    torch.testing.assert_close(call(small, found.inputs), expected, rtol=exact, atol=exact)


@pytest.mark.parametrize("name", ALL)
def test_nothing_removed_is_nothing_changed(name):
    found = case(name, torch.float32)
    small = prune_structured(found.model, found.inputs, 0.0)
    assert torch.equal(call(small, found.inputs), call(found.model, found.inputs))
    before, after = found.model.state_dict(), small.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ALL)
def test_smaller_saved_trained_and_compressed(name, tmp_path):
    found = case(name, torch.float32)
    before = copy.deepcopy(found.model.state_dict())
    small = prune_structured(found.model, found.inputs, 0.5, multiple_of=2)
    report = small.removal_report
    assert all(torch.equal(before[key], v) for key, v in found.model.state_dict().items())

    counted = sum(p.numel() for p in small.parameters())
    assert counted == report.parameters_after < report.parameters_before
    gone = {g.name: len(g.removed) for g in report.groups}
    groups = trace(found.model, found.inputs)
    # Units of one layer share no weight; where two groups meet in a matrix, its corner goes once.
    assert report.parameters_before - counted <= sum(
        groups[name].weights * count for name, count in gone.items()
    )
    assert report.macs_after == macs(small, found.inputs) < 0.75 * report.macs_before

    trine.save(small, tmp_path / "small.trine")
    transformers = hasattr(found.model, "config")
    like = None if transformers or name == "mobilenet" else lambda: case(name, torch.float32).model
    again = trine.load(tmp_path / "small.trine", like=like)
    assert torch.equal(call(again, found.inputs), call(small, found.inputs))

    twin = copy.deepcopy(small)
    twin.load_state_dict(small.state_dict())
    out = twin(found.inputs) if isinstance(found.inputs, Tensor) else twin(**found.inputs)
    (out if isinstance(out, Tensor) else out["logits"]).square().mean().backward()
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    optimizer.step()
    assert all(p.grad is None or p.grad.shape == p.shape for p in twin.parameters())
    assert not torch.equal(call(twin, found.inputs), call(small, found.inputs))

    packed = trine.compress(small, trine.Recipe("int8", prefer="size"), found.inputs)
    assert any(row.swapped for row in packed.report.layers)
    full = call(small, found.inputs)
    assert (call(packed, found.inputs) - full).norm() < 0.1 * full.norm()


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generates_with_a_cache(name):
    found = case(name)
    small = prune_structured(found.model, found.inputs, 0.5, kinds="head", multiple_of=1)
    ids = found.inputs["input_ids"]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = small.generate(ids, **settings, use_cache=True)
    assert torch.equal(cached, small.generate(ids, **settings, use_cache=False))
    assert cached.shape[1] >= 5


DROPPED = {
    "bert": "bert.encoder.layer.0",
    "gpt2": "transformer.h.0",
    "llama": "model.layers.0",
    "t5": "encoder.block.1",
    "vit": "vit.layers.1",
    "resnet": "blocks.2",
}


@pytest.mark.parametrize("name", DROPPED)
def test_a_dropped_layer_passes_its_input_on(name, tmp_path):
    found = case(name)
    before = call(found.model, found.inputs)
    small = drop_layers(found.model, found.inputs, DROPPED[name])
    again = call(small, found.inputs)
    trine.save(small, tmp_path / "small.trine")
    like = None if hasattr(small, "config") else lambda: case(name).model
    loaded = trine.load(tmp_path / "small.trine", like=like)
    assert torch.equal(call(loaded, found.inputs), again)
    if name in ("gpt2", "llama"):
        ids = small.generate(found.inputs["input_ids"], max_new_tokens=3, do_sample=False)
        assert ids.shape[1] == 9

    def skip(module, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        return (x, *output[1:]) if isinstance(output, tuple) else x

    layer = found.model.get_submodule(DROPPED[name])
    layer.register_forward_hook(skip, with_kwargs=True)
    assert torch.equal(again, call(found.model, found.inputs))
    assert not torch.allclose(again, before, rtol=1e-3)
    gone = sum(p.numel() for p in layer.parameters())
    assert sum(p.numel() for p in small.parameters()) == (
        sum(p.numel() for p in found.model.parameters()) - gone
    )


def test_named_outputs_take_what_is_coupled_along():
    found = case("llama")
    small = remove(
        found.model,
        found.inputs,
        {"model.layers.0.self_attn.k_proj": [5], "model.layers.1.mlp.up_proj": range(7)},
    )
    first, second = small.model.layers
    # Key-value head 1 of width 4, with its two queries.
    assert first.self_attn.k_proj.weight.shape == (12, 32)
    kept = [i for i in range(32) if not 8 <= i < 16]
    whole = found.model.model.layers[0].self_attn
    assert torch.equal(first.self_attn.q_proj.weight, whole.q_proj.weight[kept])
    assert torch.equal(first.self_attn.o_proj.weight, whole.o_proj.weight[:, kept])
    assert second.mlp.down_proj.weight.shape == (32, 41)
    assert (second.mlp.gate_proj.out_features, second.mlp.down_proj.in_features) == (41, 41)


def test_what_is_left_is_a_multiple():
    found = case("bert", torch.float32)
    for ratio, multiple in ((0.5, 16), (0.3, 16), (0.9, 20), (0.01, 8)):
        small = prune_structured(
            found.model, found.inputs, ratio, kinds="neuron", multiple_of=multiple
        )
        for group in small.removal_report.groups:
            if group.removed:
                assert group.after % multiple == 0
                assert 0 <= group.after - group.before * (1 - ratio) < multiple
    small = prune_structured(found.model, found.inputs, 0.5, kinds="head", multiple_of=32)
    assert not any(group.removed for group in small.removal_report.groups)  # 4 heads of 8 are 32


def test_worst_units_go_first_in_each_layer_or_in_all():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(3, 4)
    worth = {"0": [5.0, 0.2, 4.0, 6.0, 7.0, 0.1], "2": [2.0, 3.0, 1.0, 9.0, 9.0, 9.0]}

    def scores(model, layers):
        rows = {name: torch.tensor(values) for name, values in worth.items()}
        whole = {n: torch.full_like(m.weight, 0.0) for n, m in layers.items()}
        return {n: s + rows[n][:, None] * len(s) if n in rows else s for n, s in whole.items()}

    each = prune_structured(model, x, 1 / 3, importance=scores, multiple_of=1)
    assert removed(each) == {"0": (1, 5), "2": (0, 2)}
    # A unit j of "0" is worth (4 * 6 w[j] + 6 * 33) / 10, as a column of "2" goes with it; one of
    # "2" (6 * 6 w[j] + 2 * 0) / 8. They hold 11 and 9 weights with their biases: of 35% of 120
    # there is room for the worst three of "2" and then one of "0".
    both = prune_structured(model, x, 0.35, importance=scores, multiple_of=1, scope="global")
    assert removed(both) == {"0": (5,), "2": (0, 1, 2)}
    some = prune_structured(model, x, {"0": 0.5}, importance=scores, multiple_of=1)
    assert removed(some) == {"0": (1, 2, 5), "2": ()}
    kept = prune_structured(model, x, 0.5, importance=scores, multiple_of=1, keep="0")
    assert removed(kept) == {"0": (), "2": (0, 1, 2)}


def test_training_goes_on_in_the_smaller_model():
    """As the whole model would, whose removed weights are zero and stay so."""
    found = case("bert")
    model, labels = found.model, torch.tensor([0, 1])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)

    def train(model: nn.Module, after=lambda: None) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(**found.inputs, labels=labels).loss.backward()
            optimizer.step()
            optimizer.param_groups[0]["lr"] /= 2
            after()

    train(model)
    small = prune_structured(model, found.inputs, 0.5, multiple_of=1)
    whole, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    hand_over(optimizer, model, small)
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == (
        small.removal_report.parameters_after
    )
    train(small)

    def zero() -> None:
        for name, parameter in whole.named_parameters():
            for dim, kept in small.removal_report.positions.get(name, {}).items():
                gone = sorted(set(range(parameter.shape[dim])) - set(kept.tolist()))
                parameter.data.index_fill_(dim, torch.tensor(gone), 0)

    optimizer = torch.optim.AdamW(whole.parameters(), 1e-2, weight_decay=0.1)
    optimizer.load_state_dict(state)
    zero()
    train(whole, zero)
    torch.testing.assert_close(call(small, found.inputs), call(whole, found.inputs))
    with pytest.raises(ValueError, match="not the model's"):
        hand_over(optimizer, model, small)


def test_what_a_pruner_turned_off_is_removed():
    found = case("bert")
    pruner = Pruner(found.model, Magnitude(), Neuron(), PerLayer(0.5), layers="*intermediate.dense")
    model = pruner.finish()
    small = remove(model, found.inputs, pruner.removed())
    assert small.bert.encoder.layer[0].intermediate.dense.out_features == 24
    torch.testing.assert_close(call(small, found.inputs), call(model, found.inputs))


def test_macs_are_those_of_products_convolutions_and_attention():
    image = torch.randn(1, 3, 8, 8)
    assert macs(nn.Conv2d(3, 6, 3, padding=1), image) == 64 * 6 * 3 * 9
    assert macs(nn.Conv2d(3, 6, 3, padding=1, groups=3), image) == 64 * 6 * 9
    found = case("llama", torch.float32)  # 2 x 6 tokens, 8 heads of 4, 4 of keys and values
    layer = 12 * (32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48) + 2 * 8 * 6 * 6 * (4 + 4)
    assert macs(found.model, found.inputs) == 2 * layer + 12 * 32 * 60


class _Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)).sort(-1).values)


class _Literal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Linear(72, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).view(-1, 72))


class _Looked(nn.Module):
    """Its units are made by a table and read by a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(10, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.table(x)).sum(-1)


class _Position(nn.Module):
    """Reads numbered features of a layer by arithmetic that no operator shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        ramp = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)
        return self.b(x * ramp)


def test_an_operator_without_a_rule_freezes():
    model, x = _Sorted(), torch.randn(3, 4)
    groups = trace(model, x)
    assert groups["a"].size == 8
    assert "b" not in groups
    assert "aten::sort" in groups.frozen["b"]
    assert groups.without_rule == {"aten::sort": ""}
    small = prune_structured(model, x, 0.5, multiple_of=1)
    assert "aten::sort" in str(small.removal_report)
    assert small.b.weight.shape == (8, 4)
    with pytest.raises(ValueError, match="'b' must stay: aten::sort"):
        remove(model, x, {"b": [0]})
    # A tensor made by arithmetic has a size of its own, which holds what meets it.
    assert "elementwise" in trace(_Position(), x).frozen["a"]


def test_tied_weights_stay_tied():
    found = case("bert")
    layers = found.model.bert.encoder.layer
    layers[1].intermediate.dense.weight = layers[0].intermediate.dense.weight
    groups = trace(found.model, found.inputs)
    assert len([name for name in groups if "intermediate" in name]) == 1
    small = prune_structured(found.model, found.inputs, 0.5, kinds="neuron")
    one, other = (layer.intermediate.dense for layer in small.bert.encoder.layer)
    assert one.weight is other.weight
    assert one.weight.shape == (24, 32)
    names = [f"bert.encoder.layer.{i}" for i in range(2)]
    found.readers[f"{names[0]}.intermediate.dense"] = [(f"{n}.output.dense", 1) for n in names]
    expected = masked(found, removed(small))
    torch.testing.assert_close(call(small, found.inputs), expected, rtol=1e-10, atol=1e-12)


def test_errors_say_what_to_do():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)

    def says(match: str, call, *args, **kwargs) -> None:
        before = {name: p.clone() for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match=match):
            call(*args, **kwargs)
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters())

    says("takes a torch.nn.Module", trace, lambda x: x, x)
    says("cannot be called with such a batch", trace, model, (x, x))
    says("torch.compile on the result", trace, torch.compile(model), x)
    for bad in (1.0, -0.1, float("nan"), "half"):
        says(r"ratio is a share in \[0, 1\)", prune_structured, model, x, bad)
    says("kinds are some of", prune_structured, model, x, 0.5, kinds="heads")
    says("scope is", prune_structured, model, x, 0.5, scope="all")
    says("multiple_of", prune_structured, model, x, 0.5, multiple_of=0)
    says("no layer .* is named 'x'", prune_structured, model, x, 0.5, keep="x")
    says("no layer .* is named 'x'", prune_structured, model, x, {"x": 0.5})
    says("goes with scope='layer'", prune_structured, model, x, {"0": 0.5}, scope="global")
    says("nothing of the kinds head", prune_structured, model, x, 0.5, kinds="head")
    says("no score for each weight", prune_structured, model, x, 0.5, importance=lambda m, n: {})
    says("no linear, convolutional or embedding layer '1'", remove, model, x, {"1": [0]})
    says("has outputs 0 to 7; got", remove, model, x, {"0": [8]})
    says("'2' must stay: the model's output", remove, model, x, {"2": [0]})
    says("nothing would be left of '0'", remove, model, x, {"0": range(8)})
    says("no layer 'x'", drop_layers, model, x, "x")
    says("first input's shape", drop_layers, model, x, "0")
    found = case("t5")
    says("others need more of", drop_layers, found.model, found.inputs, "encoder.block.0")
    both = [f"decoder.block.{i}" for i in range(2)]
    says("nothing would be left of", drop_layers, found.model, found.inputs, both)
    words = torch.randint(10, (2, 3))
    says("no weight .* are worth", prune_structured, _Looked(), words, 0.5, kinds="hidden")
    image = torch.randn(2, 1, 5, 5)
    says("'head' raises", prune_structured, _Literal(), image, 0.5, multiple_of=2)
    model[0].weight.data[1, 2] = float("nan")
    with pytest.raises(ValueError, match="scores of layer '0' hold NaN"):
        prune_structured(model, x, 0.5)
