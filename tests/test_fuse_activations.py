"""fuse_activations: which activations layers take over, why others stay, and that the model stays
what it was."""

import copy
import re

import pytest
import torch
import transformers as hf
import trine
from torch import nn
from trine.nn import pack_linear


def faster(calls):
    for call in calls.values():
        call()
    assert list(calls) == ["apart", "fused"]
    return {"apart": 3.0, "fused": 2.0}


def packed(k: int = 8, n: int = 6, choice: str = "int8") -> nn.Module:
    return pack_linear(nn.Linear(k, n), choice)


def fuse(model: nn.Module, x: object = None) -> nn.Module:
    return trine.fuse_activations(model, torch.randn(3, 8) if x is None else x, timer=faster)


def reason(model: nn.Module, x: object = None) -> str:
    """Why the only activation was left alone."""
    small = fuse(model, x)
    (row,) = small.activations_report.modules
    assert not row.fused
    assert row.ratio is None
    assert type(small.get_submodule(row.name)) is type(model.get_submodule(row.name))
    return row.reason


@pytest.mark.parametrize(
    ("module", "activation"),
    [
        (nn.ReLU(), "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (hf.activations.ACT2FN["gelu"], "gelu"),
        (hf.activations.ACT2FN["gelu_new"], "gelu_tanh"),
        (hf.activations.ACT2FN["gelu_pytorch_tanh"], "gelu_tanh"),
    ],
)
@pytest.mark.parametrize("choice", ["int8", "ternary"])
def test_layers_take_them_over(module, activation, choice):
    model = nn.Sequential(packed(choice=choice), module, packed(6, 4)).eval()
    small, x = fuse(model), torch.randn(5, 8)
    assert small[0].activation == activation
    assert type(small[1]) is nn.Identity
    with torch.no_grad():
        torch.testing.assert_close(small[0](x), model[1](model[0](x)), rtol=1e-5, atol=1e-6)
        expected = model[2](small[0](x))
        assert torch.equal(small(x), expected)


def test_measures_each_case_once_and_says_what_it_found():
    model = nn.Sequential(packed(8, 8), nn.ReLU(), packed(8, 8), nn.ReLU(), packed(8, 8), nn.GELU())
    asked = []

    def timer(calls):
        asked.append(calls)
        return faster(calls)

    x = torch.randn(3, 8)
    small = trine.fuse_activations(model, [x, x, torch.randn(2, 5, 8)], timer=timer)
    assert len(asked) == 4  # two kinds of activation, 3 and 10 rows
    first, _, last = small.activations_report.modules
    assert (first.name, first.layers, first.apart_seconds, first.fused_seconds) == (
        "1",
        ("0",),
        9.0,
        6.0,
    )
    assert first.reason == "measured 1.50 times as fast, with its layers"
    assert (last.name, last.fused, last.ratio) == ("5", True, 1.5)
    text = str(small.activations_report).splitlines()
    assert text[1].split()[:3] == ["1", "fused", "1"]
    assert text[-1] == "3 of 3 activations fused"


def test_not_faster_is_left_alone():
    model = nn.Sequential(packed(), nn.ReLU())
    small = trine.fuse_activations(
        model, torch.randn(3, 8), timer=lambda _: {"apart": 1.0, "fused": 2.0}
    )
    (row,) = small.activations_report.modules
    assert (row.fused, small[0].activation) == (False, None)
    (row,) = trine.fuse_activations(model, torch.randn(3, 8)).activations_report.modules
    assert row.fused == (row.fused_seconds < row.apart_seconds)


def test_the_model_stays_as_it_is():
    model = nn.Sequential(packed(), nn.GELU()).train()
    before = copy.deepcopy(model.state_dict())
    x, state = torch.randn(3, 8), torch.get_rng_state()
    small = fuse(model, x)
    assert model.training
    assert not small.training
    assert (model[0].activation, type(model[1])) == (None, nn.GELU)
    assert small[0].packed_weight is not model[0].packed_weight
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model[0]._forward_hooks


class Residual(nn.Module):
    """Something else reads the layer's result."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.activation, self.how = packed(8, 8), nn.GELU(), how
        self.next = packed(8, 8)

    def forward(self, x):
        y = self.layer(x)
        if self.how == "sum":
            return y + self.activation(y)
        if self.how == "returned":
            return y, self.activation(y)
        if self.how == "packed layer":
            return self.next(y) + self.activation(y)
        if self.how == "other input":
            return self.activation(x) + self.activation(y)
        return self.activation(x)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("sum", "of its layer's result, the model .*reads it"),
        ("returned", "of its layer's result, the model returns it"),
        ("packed layer", "of its layer's result, .*reads it"),
        ("other input", "it reads other results, too"),
        ("float input", "it reads no result of a packed layer"),
    ],
)
def test_what_something_else_reads_is_left_alone(how, expected):

    assert re.match(expected, reason(Residual(how)))


def test_other_reasons():
    hooked = nn.Sequential(packed(), nn.ReLU())
    hooked[0].register_forward_hook(lambda *_: None)
    assert reason(hooked) == "it or its layer has hooks"
    already = nn.Sequential(packed(), nn.ReLU())
    already[0].activation = "gelu"
    assert reason(already) == "its layer has an activation already"
    dense = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), packed())
    assert reason(dense) == "it reads no result of a packed layer"


def test_one_module_behind_several_layers():
    shared = nn.ReLU()
    model = nn.Sequential(packed(8, 8), shared, packed(8, 8, "ternary"), shared)
    small = fuse(model)
    (row,) = small.activations_report.modules
    assert row.layers == ("0", "2")
    assert [small[0].activation, small[2].activation] == ["relu", "relu"]
    assert type(small[1]) is nn.Identity
    assert small[1] is small[3]


def test_bert_is_fused_saved_and_loaded(tmp_path):
    config = hf.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = hf.BertModel(config).eval()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.set_submodule(name, pack_linear(layer, "int8"))
    tokens = {"input_ids": torch.randint(0, 30, (2, 7))}
    small = fuse(model, tokens)
    assert small.activations_report.fused == 2
    dense = [layer.intermediate.dense for layer in small.encoder.layer]
    assert [layer.activation for layer in dense] == ["gelu", "gelu"]
    with torch.no_grad():
        y = small(**tokens).last_hidden_state
        assert (y - model(**tokens).last_hidden_state).abs().max() < 0.05
        trine.save(small, tmp_path / "bert.trine")
        for like in (None, lambda: hf.BertModel(config)):
            again = trine.load(tmp_path / "bert.trine", like=like)
            assert again.encoder.layer[0].intermediate.dense.activation == "gelu"
            assert torch.equal(again(**tokens).last_hidden_state, y)


def test_errors():
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match="holds no ReLU or GELU module"):
        trine.fuse_activations(nn.Sequential(packed(), nn.SiLU()), x)
    with pytest.raises(ValueError, match="holds no Int8Linear or TernaryLinear layer"):
        trine.fuse_activations(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), x)
    with pytest.raises(ValueError, match="fuse_activations takes a torch"):
        trine.fuse_activations(lambda x: x, x)
