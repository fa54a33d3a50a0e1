"""fuse_norms: which norms quantise for the layers behind them, why the others do not, and that the
model stays what it was."""

import copy

import pytest
import torch
import transformers as hf
import trine
from fake_timers import says
from torch import Tensor, nn
from trine.compress import FusionReport
from trine.nn import Int8Linear, QuantizingLayerNorm, QuantizingRMSNorm, pack_linear
from trine.ops.norm_quantize_rows import reference

# One step of int8, at some few places: what a norm of other roundings may change.
ROUNDING = 0.02


def faster(calls):
    for call in calls.values():
        call()
    assert list(calls) == ["apart", "fused"]
    return {"apart": 3.0, "fused": 2.0}


def packed(model: nn.Module, choice: str = "int8") -> nn.Module:
    recipe = trine.Recipe(choice)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D":
            model.set_submodule(name, pack_linear(layer, recipe.choice(name)))
    return model.eval()


def randomised(model: nn.Module) -> nn.Module:
    """Norms of fresh models have weights of one, biases of zero."""
    for module in model.modules():
        if "Norm" in type(module).__name__:
            for parameter in module.parameters():
                parameter.data += torch.randn_like(parameter) / 8
    return model


def block(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(norm, pack_linear(nn.Linear(8, 6), "int8")).eval()


def fuse(model: nn.Module, x: object = None) -> nn.Module:
    return trine.fuse_norms(model, torch.randn(3, 8) if x is None else x, timer=faster)


def reason(model: nn.Module, x: object = None) -> str:
    """Why the only norm was left alone."""
    small = fuse(model, x)
    (row,) = small.norms_report.modules
    assert not row.fused
    assert row.ratio is None
    assert type(small.get_submodule(row.name)) is type(model.get_submodule(row.name))
    return row.reason


# ---- what is fused ----


@pytest.mark.parametrize("choice", ["int8", "ternary"])
@pytest.mark.parametrize(
    ("norm", "kind", "definition"),
    [
        (nn.RMSNorm(8, 1e-5), QuantizingRMSNorm, "rms_norm"),
        (nn.LayerNorm(8), QuantizingLayerNorm, "layer_norm"),
        (nn.LayerNorm(8, bias=False), QuantizingLayerNorm, "layer_norm"),
    ],
)
def test_gives_the_layers_the_norm_by_its_definition(norm, kind, definition, choice):
    model = packed(randomised(nn.Sequential(norm, nn.Linear(8, 6))), choice)
    small, x = fuse(model), torch.randn(4, 8)
    assert type(small[0]) is kind
    bias = (norm.bias,) if definition == "layer_norm" else ()
    with torch.no_grad():
        normed = getattr(reference, definition)(x, norm.weight, *bias, 1e-5)
        assert torch.equal(small(x), model[1](normed))
    assert torch.equal(small(x), model(x))  # with a gradient wanted: torch's norm


def test_measures_each_case_once_and_says_what_it_found():
    model = nn.Sequential(*(block(nn.LayerNorm(8)) for _ in range(2)), nn.LayerNorm(6))
    model[0][1] = model[1][1] = pack_linear(nn.Linear(8, 8), "int8")
    model[2], model[1][1] = nn.LayerNorm(8), pack_linear(nn.Linear(8, 8), "ternary")
    asked = []

    def timer(calls):
        asked.append(calls)
        return faster(calls)

    x = torch.randn(3, 8)
    small = trine.fuse_norms(model, [x, x, torch.randn(2, 5, 8)], timer=timer)
    assert len(asked) == 4  # two kinds of layers, 3 and 10 rows
    first, second, last = small.norms_report.modules
    assert (first.name, first.layers, first.apart_seconds, first.fused_seconds) == (
        "0.0",
        ("0.1",),
        9.0,
        6.0,
    )
    assert first.reason == "measured 1.50 times as fast, with its readers"
    assert (second.fused, second.ratio, last.fused) == (True, 1.5, False)
    assert small.norms_report == FusionReport("norm", (first, second, last))
    text = str(small.norms_report).splitlines()
    assert text[0].split() == ["norm", "result", "layers", "reason"]
    assert text[1].split()[:3] == ["0.0", "fused", "1"]
    assert text[3].split()[:2] == ["2", "kept"]
    assert text[-1] == "2 of 3 norms fused"


def test_not_faster_is_left_alone():
    (row,) = trine.fuse_norms(
        block(nn.LayerNorm(8)), torch.randn(3, 8), timer=lambda _: {"apart": 1.0, "fused": 2.0}
    ).norms_report.modules
    assert (row.fused, row.reason) == (False, "measured 0.50 times as fast, with its readers")
    small = trine.fuse_norms(block(nn.LayerNorm(8)), torch.randn(3, 8))  # whatever it finds
    (row,) = small.norms_report.modules
    assert row.fused == (row.fused_seconds < row.apart_seconds)


def test_the_model_stays_as_it_is():
    model = block(nn.LayerNorm(8)).train()
    before = copy.deepcopy(model.state_dict())
    x, state = torch.randn(3, 8), torch.get_rng_state()
    small = fuse(model, x)
    assert type(model[0]) is nn.LayerNorm
    assert model.training
    assert not small.training
    assert small[0].weight is not model[0].weight
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model[0]._forward_hooks
    assert not small[0]._forward_hooks


# ---- models of transformers ----

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
TEXT = {**SIZES, "intermediate_size": 48, "vocab_size": 50}
IDS = {"input_ids": torch.arange(14).view(2, 7)}


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, num_key_value_heads=2))


def gpt2() -> nn.Module:
    tokens = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_head=4, n_layer=2, **tokens))


def vit() -> nn.Module:
    image = {"image_size": 16, "patch_size": 8, "intermediate_size": 48}
    return hf.ViTForImageClassification(hf.ViTConfig(**SIZES, **image))


MODELS = {
    "llama": (llama, IDS, "model.norm"),
    "gpt2": (gpt2, IDS, "transformer.ln_f"),
    "vit": (vit, {"pixel_values": torch.linspace(-1, 1, 1536).view(2, 3, 16, 16)}, "vit.layernorm"),
}


@pytest.mark.parametrize("name", MODELS)
def test_pre_norm_models(name, tmp_path):
    """Every norm of a block is fused, the last is not; saved and loaded with equal bits."""
    factory, inputs, last = MODELS[name]
    model = trine.compress(
        randomised(factory()).eval(), trine.Recipe("int8"), inputs, timer=says(2)
    )
    small = fuse(model, inputs)
    (kept,) = (row for row in small.norms_report.modules if not row.fused)
    assert kept.name == last
    assert " reads it (torch.Tensor." in kept.reason
    assert small.norms_report.fused == 4
    with torch.no_grad():
        logits, expected = small(**inputs).logits, model(**inputs).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=ROUNDING)
        trine.save(small, tmp_path / "a.trine")
        for like in (None, factory):
            again = trine.load(tmp_path / "a.trine", like=like)
            assert torch.equal(again(**inputs).logits, logits)
            kinds = [type(module) for module in small.modules()]
            assert [type(module) for module in again.modules()] == kinds
    assert small.report == model.report == again.report


def test_post_norm_models_are_left_alone():
    """A residual sum reads what the norm of BERT gives."""
    model = packed(hf.BertModel(hf.BertConfig(**TEXT), add_pooling_layer=False))
    small = fuse(model, IDS)
    assert small.norms_report.fused == 0
    reasons = {row.name: row.reason for row in small.norms_report.modules}
    residual = "'encoder.layer.0.output' (BertOutput) reads it (torch.Tensor.add)"
    assert reasons["encoder.layer.0.attention.output.LayerNorm"] == residual
    assert reasons["encoder.layer.1.output.LayerNorm"] == "the model returns it"
    with torch.no_grad():
        assert torch.equal(small(**IDS)[0], model(**IDS)[0])


def test_norms_of_other_roundings_are_left_alone():
    rounds = "in bfloat16 LlamaRMSNorm rounds twice, before it multiplies by the weight, too"
    assert {row.reason for row in fuse(packed(llama().bfloat16()), IDS).norms_report.modules} == {
        rounds
    }
    gemma = hf.GemmaForCausalLM(hf.GemmaConfig(**TEXT, head_dim=8, num_key_value_heads=4))
    assert {row.reason for row in fuse(packed(gemma), IDS).norms_report.modules} == {
        "GemmaRMSNorm computes something else than RMSNorm"
    }


# ---- why a norm is left alone ----


class Reads(nn.Module):
    """A norm, a layer that takes rows, and another reader of the norm."""

    def __init__(self, other, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(8), other
        self.layer = pack_linear(nn.Linear(8, 8), "int8") if layer is None else layer

    def forward(self, x: Tensor) -> object:
        normed = self.norm(x)
        return self.other(normed, self.layer(normed))


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (lambda normed, y: normed + y, "the model (Reads) reads it (torch.Tensor.add)"),
        (lambda normed, y: y @ normed.mT, "the model (Reads) reads it (torch.Tensor.mT.__get__)"),
        (lambda normed, y: y + len(normed), "the model (Reads) reads it (torch.Tensor.__len__)"),
        (lambda normed, y: torch.stack([y, normed]), "the model (Reads) reads it (torch.stack)"),
        (lambda normed, y: {"y": y, "normed": normed}, "the model returns it"),
        (lambda normed, y: y.view(normed.shape).to(normed.dtype), None),
    ],
)
def test_a_second_reader(other, expected):
    if expected is None:
        assert fuse(Reads(other)).norms_report.fused == 1
    else:
        assert reason(Reads(other)) == expected


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (lambda: nn.Linear(8, 8), "'2' (Linear) reads it"),
        (lambda: pack_linear(nn.Linear(8, 8), "sparse24"), "'2' (Sparse24Linear) reads it"),
        (
            lambda: Int8Linear.from_linear(nn.Linear(8, 8), input_scale=torch.tensor(0.1)),
            "'2' (Int8Linear) reads it",
        ),
    ],
)
def test_a_layer_that_takes_no_rows(layer, expected):
    first, norm = pack_linear(nn.Linear(8, 8), "int8"), nn.LayerNorm(8)
    assert reason(nn.Sequential(first, norm, layer())) == expected


class Branch(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def changed(model: nn.Module, change) -> nn.Module:
    change(model)
    return model


class Loud(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Branch(None), "no sample reached it"),
        (lambda: nn.Sequential(block(nn.LayerNorm(8))[1], Dropped()), "nothing reads it"),
        (lambda: block(Loud(8)), "Loud has a forward of its own"),
        (lambda: block(nn.LayerNorm(8, elementwise_affine=False)), "weight is not a plain param"),
        (lambda: block(nn.LayerNorm((3, 8))), "it is a norm over several dimensions"),
        (
            lambda: changed(
                block(nn.LayerNorm(8)), lambda m: m[0].register_forward_hook(lambda *_: None)
            ),
            "it has hooks, which expect a tensor",
        ),
        (
            lambda: changed(
                block(nn.LayerNorm(8)), lambda m: m[1].register_forward_pre_hook(lambda *_: None)
            ),
            "'1' (Int8Linear) reads it",
        ),
        (
            lambda: changed(block(nn.LayerNorm(8)), lambda m: setattr(m, "tied", m[0].weight)),
            "its weight or bias is shared with another module",
        ),
        (lambda: fuse(block(nn.LayerNorm(8))), "it quantises already"),
    ],
)
def test_what_is_left_alone(make, expected):
    assert expected in reason(make())


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        self.norm(x)
        return x


class AsksForTheClass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = pack_linear(nn.Linear(8, 6), "int8")

    def forward(self, x: object) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError("a tensor, please")
        return self.layer(x)


def test_errors():
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"takes a torch\.nn\.Module"):
        trine.fuse_norms([], x)
    with pytest.raises(ValueError, match="no LayerNorm or RMSNorm"):
        fuse(nn.Sequential(pack_linear(nn.Linear(8, 6), "int8")))
    with pytest.raises(ValueError, match=r"call torch\.compile on the result"):
        fuse(torch.compile(block(nn.LayerNorm(8))))
    with pytest.raises(ValueError, match=r"fails on the samples.*a tensor, please"):
        fuse(nn.Sequential(nn.LayerNorm(8), AsksForTheClass()))
    with pytest.raises(ValueError, match="sample_inputs must be"):
        fuse(block(nn.LayerNorm(8)), 3)
