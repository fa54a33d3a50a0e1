"""Checkpoints of models whose structure was changed after they were built."""

import copy
import hashlib
import json
import pickle

import pytest
import safetensors.torch
import torch
import transformers
import trine
from fake_timers import says
from torch import nn
from trine import Recipe
from trine.compress.edits import apply, difference, record, recorded, skeleton

TOKENS = torch.arange(12).reshape(2, 6)
SIZES = {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 4, "vocab_size": 30}


def bert() -> nn.Module:
    config = transformers.BertConfig(**SIZES, intermediate_size=24, max_position_embeddings=8)
    return transformers.BertModel(config).eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_layer=3, n_embd=16, n_head=4, vocab_size=30, n_positions=8)
    return transformers.GPT2LMHeadModel(config).eval()


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        **SIZES, intermediate_size=24, num_key_value_heads=2, tie_word_embeddings=False
    )
    return transformers.LlamaForCausalLM(config).eval()


class Net(nn.Module):
    """A model of the user's own, with a branch and a shared module."""

    def __init__(self):
        super().__init__()
        self.width = 8
        self.convolution = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.branch = nn.Conv2d(8, 8, 1)
        self.act = self.again = nn.ReLU()
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.act(self.norm(self.convolution(x)))
        if self.branch is not None:
            x = self.again(x + self.branch(x))
        return self.head(x.reshape(len(x), self.width, -1).mean(2))


def cut(layer: nn.Module, *, inputs: int | None = None, outputs: int | None = None) -> None:
    """Keep the first inputs and outputs of a Linear, Conv2d or Conv1D, in place."""
    weight = layer.weight.data
    transposed = type(layer).__name__ == "Conv1D"
    weight = weight.T if transposed else weight
    weight = weight[:outputs, :inputs]
    names = {nn.Linear: "features", nn.Conv2d: "channels"}.get(type(layer))
    if names:
        vars(layer)[f"out_{names}"], vars(layer)[f"in_{names}"] = weight.shape[:2]
    else:
        layer.nf, layer.nx = weight.shape
    layer.weight = nn.Parameter((weight.T if transposed else weight).clone())
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.data[:outputs].clone())


def bert_without_heads(model: nn.Module) -> None:
    for index, layer in enumerate(model.encoder.layer):
        heads = 4 - index - 1
        attention = layer.attention.self
        for linear in (attention.query, attention.key, attention.value):
            cut(linear, outputs=4 * heads)
        cut(layer.attention.output.dense, inputs=4 * heads)
        attention.num_attention_heads, attention.all_head_size = heads, 4 * heads
        cut(layer.intermediate.dense, outputs=20 - index)
        cut(layer.output.dense, inputs=20 - index)


def bert_without_layers(model: nn.Module) -> None:
    del model.encoder.layer[1]


def bert_with_shared_layers(model: nn.Module) -> None:
    model.encoder.layer[1] = model.encoder.layer[2] = model.encoder.layer[0]


def bert_with_factors(model: nn.Module) -> None:
    dense = model.encoder.layer[0].intermediate.dense
    first, second = nn.Linear(16, 3, bias=False), nn.Linear(3, 24)
    model.encoder.layer[0].intermediate.dense = nn.Sequential(first, second)
    model.embeddings.word_embeddings = nn.Sequential(nn.Embedding(30, 4), nn.Linear(4, 16, False))
    assert dense.out_features == 24


def bert_without_pooler(model: nn.Module) -> None:
    model.pooler = None


def bert_without_bias(model: nn.Module) -> None:
    model.encoder.layer[2].output.dense.bias = None


def gpt2_pruned(model: nn.Module) -> None:
    block = model.transformer.h[1]
    cut(block.mlp.c_fc, outputs=40)
    cut(block.mlp.c_proj, inputs=40)
    cut(block.attn.c_attn, outputs=24)
    cut(block.attn.c_proj, inputs=8)
    block.attn.num_heads, block.attn.split_size = 2, 8
    del model.transformer.h[0]


def gpt2_untied(model: nn.Module) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data * 2)


def gpt2_with_few_words(model: nn.Module) -> None:
    words = nn.Parameter(model.transformer.wte.weight.data[:20].clone())
    model.transformer.wte.weight = model.lm_head.weight = words
    model.transformer.wte.num_embeddings = model.lm_head.out_features = 20


def llama_narrow(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.weight = nn.Parameter(module.weight.data[:12] * 1.5)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            cut(linear, inputs=12)
        for linear in (mlp.gate_proj, mlp.up_proj):
            cut(linear, inputs=12)
        cut(attention.o_proj, outputs=12)
        cut(mlp.down_proj, outputs=12)
    cut(model.lm_head, inputs=12)
    model.model.embed_tokens = nn.Embedding(30, 12)


def llama_tied(model: nn.Module) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


CHANGES = {
    bert: (
        bert_without_heads,
        bert_without_layers,
        bert_with_shared_layers,
        bert_with_factors,
        bert_without_pooler,
        bert_without_bias,
    ),
    gpt2: (gpt2_pruned, gpt2_untied, gpt2_with_few_words),
    llama: (llama_narrow, llama_tied),
}


def output(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS)[0]


@pytest.mark.parametrize(
    ("build", "change"), [(build, change) for build in CHANGES for change in CHANGES[build]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_model_of_transformers_needs_no_factory(tmp_path, build, change, dtype):
    model = build()
    change(model)
    model.to(dtype)
    expected = output(model)
    trine.save(model, tmp_path / "a.trine")
    state = torch.get_rng_state()
    again = trine.load(tmp_path / "a.trine")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(output(again), expected)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    modules = [list(m.named_modules(remove_duplicate=False)) for m in (model, again)]
    assert [(n, type(m)) for n, m in modules[0]] == [(n, type(m)) for n, m in modules[1]]
    trine.save(again, tmp_path / "b.trine")
    assert (tmp_path / "a.trine").read_bytes() == (tmp_path / "b.trine").read_bytes()


@pytest.mark.parametrize("change", [bert_without_heads, bert_with_shared_layers, bert_with_factors])
def test_a_changed_model_is_compressed_saved_and_loaded(tmp_path, change):
    model = bert()
    change(model)
    small = trine.compress(model, Recipe("int8"), TOKENS, timer=says(2))
    assert small.report.swapped
    trine.save(small, tmp_path / "a.trine")
    again = trine.load(tmp_path / "a.trine")
    assert torch.equal(output(again), output(small))
    shared = again.encoder.layer[0] is again.encoder.layer[2]
    assert shared == (change is bert_with_shared_layers)


def test_ties_in_a_tree_and_settings_changed_after_building(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Dropout(0.1))
    model[2].weight = model[0].weight
    model[1].eps, model[3].p = 1e-3, 0.4
    trine.save(model, tmp_path / "a.trine")
    again = trine.load(tmp_path / "a.trine")
    assert again[2].weight is again[0].weight
    assert (again[1].eps, again[3].p) == (1e-3, 0.4)


# ---- models of the user's own ----


def shrunk(net: nn.Module) -> nn.Module:
    """A copy without the branch, and with fewer channels."""
    small = copy.deepcopy(net)
    cut(small.convolution, outputs=5)
    small.norm = nn.BatchNorm2d(5)
    small.branch = None
    cut(small.head, inputs=5)
    small.width = 5
    record(net, small)
    return small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_recorded_is_done_again_to_what_the_factory_returns(tmp_path, dtype):
    net, x = Net().eval().to(dtype), torch.randn(2, 1, 4, 4, dtype=dtype)
    small = shrunk(net).eval()
    twice = copy.deepcopy(small)
    twice.head = nn.Sequential(nn.Linear(5, 2, bias=False), nn.Linear(2, 10)).to(dtype)
    record(small, twice)
    assert recorded(net) == []
    for index, model in enumerate((small, twice, trine.compress(twice, Recipe("int8"), x))):
        path = tmp_path / f"{index}.trine"
        trine.save(model, path)
        again = trine.load(path, like=lambda: Net().to(dtype))
        assert torch.equal(again(x), model(x))
        assert type(again.convolution) is nn.Conv2d
        assert again.act is again.again
        trine.save(again, tmp_path / "again.trine")
        assert (tmp_path / "again.trine").read_bytes() == path.read_bytes()
        with pytest.raises(ValueError, match="pass like=a function that returns the float model"):
            trine.load(path)


def test_what_was_recorded_does_not_fit_another_model(tmp_path):
    trine.save(shrunk(Net()), tmp_path / "a.trine")
    other = bert()
    before = [name for name, _ in other.named_modules()]
    with pytest.raises(ValueError, match=r"the edit .*'width'.* is malformed"):
        trine.load(tmp_path / "a.trine", like=lambda: other)
    assert [name for name, _ in other.named_modules()] == before

    wide = Net()
    wide.head = nn.Linear(8, 11)
    with pytest.raises(ValueError, match=r"'head\.bias' has shape \[11\].*\[10\] in the file"):
        trine.load(tmp_path / "a.trine", like=lambda: wide)
    assert wide.convolution.out_channels == 8  # untouched
    assert wide.branch is not None


def test_a_change_in_place_is_recorded_from_a_skeleton():
    net = Net()
    before = skeleton(net)
    assert all(tensor.is_meta for tensor in (*before.parameters(), *before.buffers()))
    cut(net.head, outputs=7)
    record(before, net)
    again = Net()
    apply(again, recorded(net))
    assert (again.head.out_features, again.head.weight.shape) == (7, (7, 8))


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net, "head", nn.Bilinear(2, 2, 2)),
        lambda net: setattr(net, "width", "8"),
        lambda net: setattr(net, "depth", 3),
        lambda net: net.register_buffer("more", torch.zeros(1)),
        lambda net: setattr(net.act, "forward", torch.sigmoid),
        lambda net: setattr(net, "again", nn.Softshrink()),
    ],
)
def test_a_change_without_description_is_none(change):
    net = Net()
    changed = copy.deepcopy(net)
    change(changed)
    assert difference(skeleton(net), changed) is None
    record(net, changed)
    assert recorded(changed) is None
    record(changed, copied := copy.deepcopy(changed))
    assert recorded(copied) is None


def test_equal_structures_differ_by_nothing():
    for build in (bert, gpt2, llama, Net):
        assert difference(skeleton(build()), build()) == []


# ---- a hostile list of edits ----


def chain(length: int) -> list:
    """Modules inside of each other, each under two names."""
    edits = []
    for depth in range(length):
        name = ".".join(["0"] * (depth + 1))
        inner = {"class": "Sequential", "children": {"0": {"class": "Identity", "arguments": {}}}}
        edits.append([name, {"module": inner}])
    for depth in reversed(range(length)):
        name = ".".join(["0"] * (depth + 1))
        edits.append([f"{name}.1", {"module": {"same_as": f"{name}.0"}}])
    return edits


@pytest.mark.parametrize(
    "edits",
    [
        3,
        {"0": {"attributes": {}}},
        [3],
        [["0"]],
        [["0", {}]],
        [["0", {"attributes": {}, "shapes": {}}]],
        [["0", {"call": "os.system"}]],
        [["9", {"attributes": {"in_features": 3}}]],
        [["0", {"attributes": {"in_features": "12"}}]],
        [["0", {"attributes": {"in_features": True}}]],
        [["0", {"attributes": {"in_features": {"a": 1}}}]],
        [["0", {"attributes": {"forward": 1}}]],
        [["0", {"attributes": {"_parameters": 1}}]],
        [["0", {"attributes": {"training": [False]}}]],
        [["0", {"attributes": {"nothing": 1}}]],
        [["1", {"attributes": {"inplace": 1}}]],
        [["0", {"shapes": {"weight": [-1, 2]}}]],
        [["0", {"shapes": {"weight": "12"}}]],
        [["0", {"shapes": {"forward": [1]}}]],
        [["0", {"shapes": {"weight": [10**7, 10**7]}}]],
        [["0", {"shapes": {"weight": None}}]],
        [["0", {"ties": {"weight": "9.weight"}}]],
        [["0", {"ties": {"weight": "4.weight"}}]],
        [["0", {"ties": {"weight": 3}}]],
        [["0", {"module": {"class": "Bilinear", "arguments": {"in1_features": 1}}}]],
        [["0", {"module": {"class": "os.system", "arguments": {"command": "true"}}}]],
        [["0", {"module": {"class": "Linear", "arguments": {"in_features": 12}}}]],
        [["0", {"module": {"same_as": "no"}}]],
        [["0", {"module": {"same_as": ""}}]],
        [["0", {"module": None}]],
        [["", {"module": {"class": "Identity", "arguments": {}}}]],
        [["forward", {"module": {"class": "Identity", "arguments": {}}}]],
        [["a.b", {"module": {"class": "Identity", "arguments": {}}}]],
        [["0.same", {"module": {"same_as": "0"}}]],
        [["", {"children": ["0"]}]],
        [["", {"children": ["0", "x"]}]],
        [["", {"children": "0"}]],
        [["", {"children": None}]],
        chain(40),
    ],
)
def test_edits_that_save_would_not_write_are_refused(tmp_path, edits):
    path = tmp_path / "a.trine"
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    trine.save(model, path)
    with safetensors.safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()["trine"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    del manifest["sha256"]
    for where, like in ((manifest["model"], None), (manifest, lambda: model)):
        where["edits"] = edits
        digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
        header = json.dumps({**manifest, "sha256": digest})
        safetensors.torch.save_file(tensors, path, {"trine": header})
        with pytest.raises(ValueError, match="cannot load"):
            trine.load(path, like=like)
        del where["edits"]
    assert isinstance(model[0], nn.Linear)
    assert len(model) == 5


def test_recorded_edits_are_plain_data():
    small = shrunk(Net())
    edits = recorded(small)
    assert json.loads(json.dumps(edits)) == json.loads(json.dumps(recorded(copy.deepcopy(small))))
    assert recorded(pickle.loads(pickle.dumps(small))) == edits
