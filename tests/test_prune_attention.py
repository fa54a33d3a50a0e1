"""The heads of nn.MultiheadAttention: separated, removed, and what must stay, with the reason."""

import copy
import pickle

import pytest
import torch
import trine
from structured_models import Case
from torch import Tensor, nn
from torch.nn import functional as F
from trine.nn import SeparateAttention
from trine.prune import (
    Head,
    Magnitude,
    OneShot,
    PerLayer,
    Pruner,
    hand_over,
    macs,
    prune_structured,
    remove,
    separate_attention,
    trace,
)

WIDTH, HEADS = 32, 4


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # these models are too small for more


class Block(nn.Module):
    """As torchvision's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(1, 17, WIDTH))
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


class Sentences(nn.Module):
    """torch's encoder, of which padding is left out; its heads go through a nested tensor."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, activation="gelu", batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = self.encoder(x, src_key_padding_mask=padding)
        return self.head(x.masked_fill(padding[..., None], 0).sum(1))


class Translation(nn.Module):
    """torch's decoder, time first."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoderLayer(WIDTH, HEADS, 48, norm_first=True)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(len(x), dtype=x.dtype)
        return self.head(self.decoder(x, memory, tgt_mask=causal, tgt_is_causal=True))


class Cross(nn.Module):
    """Keys and values of other widths, no biases, and weights that are made but not read."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(
            WIDTH, HEADS, bias=False, kdim=12, vdim=20, batch_first=True
        )
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return self.head(q + self.attend(q, k, v, attn_mask=mask)[0])


def vision() -> Case:
    readers = {}
    for i in range(2):
        readers[f"blocks.{i}.attention.q_proj"] = [(f"blocks.{i}.attention.out_proj", 8)]
        readers[f"blocks.{i}.mlp.0"] = [(f"blocks.{i}.mlp.2", 1)]
    return Case(Vision(), (torch.randn(2, 3, 16, 16),), readers)


def sentences() -> Case:
    readers = {}
    for i in range(2):
        at = f"encoder.layers.{i}"
        readers[f"{at}.self_attn.q_proj"] = [(f"{at}.self_attn.out_proj", 8)]
        readers[f"{at}.linear1"] = [(f"{at}.linear2", 1)]
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    return Case(Sentences(), (torch.randn(2, 6, WIDTH), padding), readers)


def translation() -> Case:
    readers = {"decoder.linear1": [("decoder.linear2", 1)]}
    for kind in ("self_attn", "multihead_attn"):
        readers[f"decoder.{kind}.q_proj"] = [(f"decoder.{kind}.out_proj", 8)]
    return Case(Translation(), (torch.randn(5, 2, WIDTH), torch.randn(7, 2, WIDTH)), readers)


def cross() -> Case:
    inputs = [torch.randn(2, 5, WIDTH), torch.randn(2, 7, 12), torch.randn(2, 7, 20)]
    mask = torch.rand(5, 7) < 0.3
    return Case(Cross(), (*inputs, mask), {"attend.q_proj": [("attend.out_proj", 8)]})


def case(make, dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(0)
    found = make()
    found.model.to(dtype).eval()
    found.inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in found.inputs)
    with torch.no_grad():  # biases that start at zero would hide one that is left behind
        for name, parameter in found.model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return found


def call(model: nn.Module, found: Case) -> Tensor:
    with torch.no_grad():
        return model(*found.inputs)


def zeroed(found: Case, small: nn.Module) -> nn.Module:
    """The whole model whose layers read nothing of what was removed: by hand."""
    model = copy.deepcopy(found.model)
    for group in small.removal_report.groups:
        for layer, width in found.readers.get(group.name, ()):
            for unit in group.removed:
                columns = slice(unit * width, (unit + 1) * width)
                model.get_submodule(layer).weight.data[:, columns] = 0
    return model


MAKERS = [vision, sentences, translation, cross]
each_model = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


@each_model
def test_removing_heads_is_zeroing(make):
    found = case(make)
    before = call(found.model, found)
    small = prune_structured(found.model, found.inputs, 0.5, multiple_of=1)
    groups = {g.name: g for g in small.removal_report.groups if g.kind != "hidden"}
    assert groups.keys() == found.readers.keys()
    assert all(len(g.removed) == g.before // 2 for g in groups.values())
    assert {g.kind for g in groups.values() if g.name.endswith("q_proj")} == {"head"}
    expected = call(zeroed(found, small), found)
    assert not torch.allclose(expected, before, rtol=1e-3)
    torch.testing.assert_close(call(small, found), expected, rtol=1e-10, atol=1e-12)
    with torch.inference_mode():
        assert torch.equal(small(*found.inputs), call(small, found))
    # With gradients neither model takes torch's fast path.
    torch.testing.assert_close(small(*found.inputs), expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(call(found.model, found), before)


@each_model
def test_nothing_removed_is_nothing_changed(make):
    found = case(make, torch.float32)
    small = prune_structured(found.model, found.inputs, 0.0)
    assert torch.equal(call(small, found), call(found.model, found))
    assert str(small) == str(found.model)
    before, after = found.model.state_dict(), small.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@each_model
def test_smaller_saved_copied_compiled_and_compressed(make, tmp_path):
    found = case(make, torch.float32)
    small = prune_structured(found.model, found.inputs, 0.5, kinds="head", multiple_of=1)
    report = small.removal_report
    assert sum(p.numel() for p in small.parameters()) == report.parameters_after
    assert report.parameters_after < report.parameters_before
    assert report.macs_after == macs(small, found.inputs) < report.macs_before
    out = call(small, found)

    trine.save(small, tmp_path / "small.trine")
    again = trine.load(tmp_path / "small.trine", like=lambda: make().model)
    twin = copy.deepcopy(small)
    twin.load_state_dict(again.state_dict())
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    for other in (again, twin, pickle.loads(pickle.dumps(small)), compiled):
        torch.testing.assert_close(call(other, found), out)
    assert torch.equal(call(again, found), out)

    twin.train()(*found.inputs).square().mean().backward()
    assert all(p.grad.shape == p.shape for p in twin.parameters())

    packed = trine.compress(small, trine.Recipe("int8", prefer="size"), found.inputs)
    swapped = {row.name for row in packed.report.layers if row.swapped}
    assert any(name.endswith("q_proj") for name in swapped)
    assert any(name.endswith("out_proj") for name in swapped)
    assert (call(packed, found) - out).norm() < 0.1 * out.norm()
    trine.save(packed, tmp_path / "packed.trine")
    loaded = trine.load(tmp_path / "packed.trine", like=lambda: make().model)
    assert torch.equal(call(loaded, found), call(packed, found))


# ---- the layer by itself ----


def attention(**kind) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(12, 3, **kind).double().eval()
    for bias in (made.in_proj_bias, made.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    return made


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("kind", [{}, {"bias": False}, {"kdim": 5, "vdim": 7}], ids=str)
def test_the_separate_layer_is_multihead_attention(kind, average, batch_first):
    whole = attention(batch_first=batch_first, **kind)
    separate = SeparateAttention.from_attention(whole)
    n, length, source = 2, 4, 6
    q = torch.randn(n, length, 12).double()
    k = torch.randn(n, source, kind.get("kdim", 12)).double()
    v = torch.randn(n, source, kind.get("vdim", 12)).double()
    if not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    padding = torch.zeros(n, source, dtype=torch.bool)
    padding[1, 4:] = True
    flat, of_heads = torch.rand(length, source) < 0.2, torch.randn(n * 3, length, source).double()
    causal = torch.ones(length, source).triu(1).bool()
    masks = [
        {},
        {"key_padding_mask": padding},
        {"attn_mask": flat},
        {"attn_mask": of_heads},
        {"attn_mask": flat, "key_padding_mask": padding},
        {"attn_mask": flat, "key_padding_mask": torch.randn(n, source).double()},
        {"attn_mask": of_heads, "key_padding_mask": padding},
        {"attn_mask": causal, "is_causal": True},
        {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding},
    ]
    for mask in masks:
        for need in (False, True):
            options = {"need_weights": need, "average_attn_weights": average, **mask}
            expected, weights = whole(q, k, v, **options)
            out, ours = separate(q, k, v, **options)
            torch.testing.assert_close(out, expected)
            assert need == (weights is not None) == (ours is not None)
            if need:
                torch.testing.assert_close(ours, weights)
    one = [x[0] if batch_first else x[:, 0] for x in (q, k, v)]
    for expected, ours in zip(
        whole(*one, padding[1], average_attn_weights=average),
        separate(*one, padding[1], average_attn_weights=average),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)


def test_dropout_is_what_it_was():
    whole = attention(dropout=0.4, batch_first=True).train()
    separate = SeparateAttention.from_attention(whole)
    x = torch.randn(2, 5, 12).double()
    for need in (False, True):
        torch.manual_seed(1)
        expected = whole(x, x, x, need_weights=need)
        torch.manual_seed(1)
        ours = separate(x, x, x, need_weights=need)
        torch.testing.assert_close(ours, expected)
    assert not torch.allclose(separate.eval()(x, x, x)[0], ours[0])


def test_weights_are_those_of_the_heads_that_are_left():
    whole = attention(batch_first=True)
    x = torch.randn(2, 5, 12).double()
    model = _First(whole)
    small = remove(model, x, {"inner.v_proj": [5]})  # of the second head
    _, weights = whole(x, x, x, average_attn_weights=False)
    left = small.inner(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(left, weights[:, [0, 2]])
    torch.testing.assert_close(small.inner(x, x, x)[1], weights[:, [0, 2]].mean(1))
    with pytest.raises(ValueError, match=r"with 2 heads it is \[5, 5\] or \[4, 5, 5\]"):
        small.inner(x, x, x, attn_mask=torch.zeros(6, 5, 5))
    with pytest.raises(ValueError, match="key_padding_mask has shape"):
        small.inner(x, x, x, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="is_causal says"):
        small.inner(x, x, x, is_causal=True)


# ---- what stays ----


class _First(nn.Module):
    """The outputs of attention, and what is made of it and its input."""

    def __init__(self, inner: nn.Module, use=lambda inner, x: inner(x, x, x)[0]) -> None:
        super().__init__()
        self.inner, self.use, self.feed = inner, use, nn.Sequential(nn.Linear(12, 20), nn.ReLU())
        self.last = nn.Linear(20, 12).double()
        self.feed.double()

    def forward(self, x: Tensor):
        return self.last(self.feed(x)), self.use(self.inner, x)


class _Subclass(nn.MultiheadAttention):
    pass


def _own_function(inner: nn.MultiheadAttention, x: Tensor) -> Tensor:
    return F.linear(x, inner.in_proj_weight)


def _of_torch_alone(inner: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(inner, nn.MultiheadAttention):
        raise TypeError("an attention of torch is needed")
    return inner(x, x, x)[0]


def _otherwise_scaled(inner: nn.Module, x: Tensor) -> Tensor:
    return inner(x, x, x)[0] * (1 if isinstance(inner, nn.MultiheadAttention) else 2)


STAYING = {
    "adds keys of its own": (lambda: attention(add_bias_kv=True), None),
    "adds keys": (lambda: attention(add_zero_attn=True), None),
    "not as torch builds it": (lambda: _Subclass(12, 3).double(), None),
    "then raises AttributeError: 'SeparateAttention'": (attention, _own_function),
    "then raises TypeError: an attention of torch is needed": (attention, _of_torch_alone),
    "gives other outputs when separated": (attention, _otherwise_scaled),
    "mean in inner: over all heads": (attention, lambda inner, x: inner(x, x, x)),
    "the model's output keeps its size": (
        attention,
        lambda inner, x: inner(x, x, x, average_attn_weights=False),
    ),
}


@pytest.mark.parametrize("reason", STAYING)
def test_heads_that_stay_are_reported_and_all_else_goes(reason):
    inner, use = STAYING[reason]
    model = _First(inner().eval(), *([use] if use else []))
    x = torch.randn(2, 5, 12).double()
    with torch.no_grad():
        before = model(x)
    small = prune_structured(model, x, 0.5, multiple_of=1)
    assert small.last.in_features == 10
    assert type(small.inner) is type(model.inner)
    kept = {n: r for n, r in small.removal_report.kept.items() if n.startswith("inner")}
    assert any(reason in text for text in kept.values()), kept
    with torch.no_grad():
        after = small(x)[1]
    assert all(torch.equal(a, b) for a, b in zip(after, before[1], strict=True))
    with pytest.raises(ValueError, match=r"nothing of the kinds head can be removed"):
        prune_structured(model, x, 0.5, kinds="head")


@pytest.mark.parametrize("need", [False, True])
def test_a_mask_for_each_head_holds_the_heads_but_not_their_values(need):
    mask = torch.randn(15, 2, 2, dtype=torch.float64)
    inner, x = attention(), torch.randn(2, 5, 12).double()
    model = _First(inner, lambda inner, x: inner(x, x, x, attn_mask=mask, need_weights=need)[0])
    small = prune_structured(model, x, 0.5, multiple_of=1)
    assert "mask" in small.removal_report.kept["inner.q_proj"] or need
    gone = next(g.removed for g in small.removal_report.groups if g.name == "inner.v_proj")
    assert len(gone) == 2  # of 4 columns, in each of the heads
    columns = [4 * head + column for head in range(3) for column in gone]
    inner.out_proj.weight.data[:, columns] = 0
    torch.testing.assert_close(small(x)[1], model(x)[1])
    assert small.inner.q_proj.out_features == 2 * small.inner.v_proj.out_features


def test_shared_parameters_stay():
    model = nn.Sequential(_First(attention()), _First(attention()))
    model[1].inner.in_proj_weight = model[0].inner.in_proj_weight
    with pytest.raises(ValueError, match=r"'0\.inner' shares parameters"):
        separate_attention(model)
    with pytest.raises(ValueError, match=r"has no nn\.MultiheadAttention"):
        separate_attention(nn.Linear(2, 2))
    assert (
        "separate_attention makes"
        in trace(model[0], torch.randn(2, 5, 12).double()).frozen["inner.out_proj"]
    )


# ---- with the rest of the room ----


def test_separated_models_are_traced_pruned_and_saved(tmp_path):
    found = case(vision)
    separate = separate_attention(found.model)
    torch.testing.assert_close(call(separate, found), call(found.model, found))
    assert set(trace(separate, found.inputs)) >= found.readers.keys()
    assert not {id(p) for p in separate.parameters()} & {id(p) for p in found.model.parameters()}
    trine.save(separate, tmp_path / "separate.trine")
    again = trine.load(tmp_path / "separate.trine", like=lambda: case(vision).model)
    assert torch.equal(call(again, found), call(separate, found))

    layers = [f"blocks.*.attention.{key}_proj" for key in "qkv"]
    pruner = Pruner(separate, Magnitude(), Head(HEADS), PerLayer(0.5), OneShot(), layers=layers)
    masked = pruner.finish()
    small = remove(masked, found.inputs, pruner.removed())
    assert [block.attention.num_heads for block in small.blocks] == [2, 2]
    torch.testing.assert_close(call(small, found), call(masked, found))


def test_hidden_width_goes_through_separate_attention():
    found = case(vision)
    small = prune_structured(found.model, found.inputs, 0.25, kinds="hidden")
    inner = small.blocks[0].attention
    assert (inner.embed_dim, inner.out_proj.out_features, inner.num_heads) == (24, 24, 4)
    kept = small.removal_report.positions["blocks.0.attention.q_proj.weight"][1]
    whole = found.model.blocks[0].attention
    assert torch.equal(inner.q_proj.weight, whole.in_proj_weight[:32, kept])
    assert torch.equal(inner.v_proj.weight, whole.in_proj_weight[64:, kept])


def test_gradients_and_global_scope_choose_heads_as_other_units():
    found = case(vision)
    found.model(*found.inputs).square().sum().backward()

    def scores(_model, layers):
        weights = {name: layer.weight for name, layer in layers.items()}
        return {name: (w * w.grad).square() for name, w in weights.items()}

    small = prune_structured(
        found.model, found.inputs, 0.3, importance=scores, scope="global", multiple_of=1
    )
    taken = {g.name: g.removed for g in small.removal_report.groups if g.removed}
    by_hand = {}
    for i, block in enumerate(found.model.blocks):
        attn = block.attention
        rows = (attn.in_proj_weight * attn.in_proj_weight.grad).square().view(3, HEADS, 8, WIDTH)
        columns = (attn.out_proj.weight * attn.out_proj.weight.grad).square()
        heads = rows.sum((0, 2, 3)) + columns.view(WIDTH, HEADS, 8).sum((0, 2))
        by_hand[f"blocks.{i}.attention.q_proj"] = heads / (4 * 8 * WIDTH)
    for name, heads in by_hand.items():
        gone = taken.get(name, ())
        assert set(gone) == set(heads.argsort()[: len(gone)].tolist())
    assert any(name in taken for name in by_hand)
    some = prune_structured(
        found.model, found.inputs, {"blocks.0.attention.*": 0.5}, multiple_of=16
    )
    assert some.blocks[0].attention.num_heads == 2
    assert type(some.blocks[1].attention) is nn.MultiheadAttention


def test_training_goes_on_with_the_optimizers_state():
    """As the whole model would, whose removed weights are zero and stay so."""
    found = case(sentences)
    model = found.model
    optimizer = torch.optim.AdamW(model.named_parameters(), 1e-2)

    def train(model: nn.Module, after=lambda: None) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(*found.inputs).square().mean().backward()
            optimizer.step()
            after()

    train(model)
    small = prune_structured(model, found.inputs, 0.5, kinds="head", multiple_of=1)
    whole, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    hand_over(optimizer, model, small)
    group, new = optimizer.param_groups[0], dict(small.named_parameters())
    assert len(group["params"]) == len(new)
    assert all(new[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))
    train(small)

    def zero() -> None:
        for group in small.removal_report.groups:
            if group.kind == "head":
                inner = whole.get_submodule(group.name.rpartition(".")[0])
                for head in group.removed:
                    rows = slice(8 * head, 8 * head + 8)
                    inner.in_proj_weight.data.view(3, WIDTH, WIDTH)[:, rows] = 0
                    inner.in_proj_bias.data.view(3, WIDTH)[:, rows] = 0
                    inner.out_proj.weight.data[:, rows] = 0

    optimizer = torch.optim.AdamW(whole.named_parameters(), 1e-2)
    optimizer.load_state_dict(state)
    zero()
    train(whole, zero)
    torch.testing.assert_close(call(small, found), call(whole, found))
