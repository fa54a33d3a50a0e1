"""trine.from_bitnet: transformers' BitNet models, in every form, on trine's kernels."""

import statistics

import pytest
import safetensors.torch
import torch
import transformers
import trine
from bitnet_models import FORMS, bitnet_model
from torch import nn
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, pack_weights
from trine.nn import NormedTernaryLinear, TernaryLinear
from trine.ops import unpack_ternary

IDS = torch.randint(0, 97, (9, 5), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _reference_runs_eagerly():
    with torch.compiler.set_stance("force_eager"):  # its layers' torch.compile, same formulas
        yield


def _reference(folder, form: str, dtype=torch.float32) -> transformers.PreTrainedModel:
    """Written and read by transformers."""
    bitnet_model(form, dtype).save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def _distance(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("form", FORMS)
def test_logits_and_tokens_are_those_of_transformers(form, tmp_path):
    reference = _reference(tmp_path, form)
    small = trine.from_bitnet(tmp_path)
    layer = NormedTernaryLinear if "norm" in form else TernaryLinear
    layers = {n: m for n, m in small.named_modules() if isinstance(m, TernaryLinear)}
    assert len(layers) == 14
    assert {type(m) for m in layers.values()} == {layer}
    assert type(small.lm_head) is nn.Linear

    distances = [_distance(*pair) for pair in zip(_logits(small), _logits(reference), strict=True)]
    # An activation within a rounding of the middle between two codes takes the other one: that
    # moves all of its prompt, and no other.
    assert statistics.median(distances) < 5e-7
    assert max(distances) < 1e-2
    assert torch.equal(_logits(trine.from_bitnet(reference)), _logits(small))
    tokens = [
        m.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
        for m in (reference, small)
    ]
    assert torch.equal(*tokens)
    assert any(isinstance(m, BitLinear | AutoBitLinear) for m in reference.modules())  # untouched


@pytest.mark.parametrize("form", FORMS)
def test_bf16_is_no_further_from_the_exact_logits_than_transformers(form, tmp_path):
    reference = _reference(tmp_path, form, torch.bfloat16)
    small = trine.from_bitnet(tmp_path)
    assert small.dtype == torch.bfloat16
    assert small.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.float32
    small_logits, reference_logits = _logits(small), _logits(reference)
    exact = _logits(small.float())
    assert _distance(small_logits, exact) < 1.25 * _distance(reference_logits, exact)


@pytest.mark.parametrize("form", ["bitlinear with norm", "autobitlinear packed"])
def test_saved_with_trine_and_loaded_gives_equal_bits(form, tmp_path):
    _reference(tmp_path / "folder", form)
    small = trine.from_bitnet(tmp_path / "folder")
    trine.save(small, tmp_path / "small.trine")
    assert torch.equal(_logits(trine.load(tmp_path / "small.trine")), _logits(small))


@torch.no_grad()
@pytest.mark.parametrize("form", ["bitlinear", "autobitlinear packed"])
def test_one_layer_against_float64(form, tmp_path):
    """Both conventions by hand: one divides by the scale, the other multiplies, its bias too."""
    model = bitnet_model(form)
    name = "model.layers.1.self_attn.k_proj"
    layer = model.get_submodule(name)
    codes = torch.cat([layer.weight >> 2 * i & 3 for i in range(4)]).double() - 1
    scale, bias = layer.weight_scale.double(), layer.bias.double()
    model.save_pretrained(tmp_path)
    packed = trine.from_bitnet(tmp_path).get_submodule(name)
    assert torch.equal(unpack_ternary(packed.packed_weight, 64), codes.to(torch.int8))

    x = torch.randn(5, 64)
    s = 127 / x.abs().amax(1, keepdim=True).double()
    acc = (x * s).round() @ codes.T
    y = acc / s / scale + bias if form == "bitlinear" else (acc / s + bias) * scale
    assert _distance(packed(x), y) < 2e-7


def test_a_norm_of_a_layer_gives_the_gradient_of_its_formula():
    layer = trine.nn.TernaryLinear.from_linear(nn.Linear(64, 3))
    normed = NormedTernaryLinear.from_ternary(layer, torch.rand(64) + 0.5, 1e-5)
    x = torch.randn(4, 64, requires_grad=True)
    y = normed(x)
    y.sum().backward()

    x64 = x.detach().double().requires_grad_()
    rows = x64 / (x64.pow(2).mean(1, keepdim=True) + 1e-5).sqrt() * normed.norm_weight.double()
    (rows @ layer.dense_weight().double().T).sum().backward()
    assert _distance(x.grad, x64.grad) < 1e-6
    with torch.no_grad():
        assert _distance(y.detach(), normed(x)) < 1e-6
    with pytest.raises(ValueError, match=r"norm_weight has shape \[3\], expected \[64\]"):
        NormedTernaryLinear.from_ternary(layer, torch.ones(3), 1e-5)


@pytest.mark.parametrize("name", ["weight_scale", "weight"])
def test_a_missing_tensor_is_named(name, tmp_path):
    bitnet_model("autobitlinear packed").save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del tensors[f"model.layers.0.mlp.up_proj.{name}"]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.\w*weight\w* is missing"):
        trine.from_bitnet(tmp_path)


def _spoiled(change):
    model = bitnet_model("autobitlinear unpacked")
    change(model.model.layers[1].mlp.gate_proj)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.weight.fill_(0.5), "values other than -1, 0 and 1"),
        (lambda m: m.weight_scale.fill_(0.0), "must be finite and not zero"),
        (lambda m: m.weight_scale.fill_(torch.nan), "must be finite and not zero"),
        (lambda m: setattr(m, "weight", pack_weights(torch.full((160, 64), 2))), "the code 3"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_layer(change, message):
    with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.gate_proj.*{message}"):
        trine.from_bitnet(_spoiled(change))


def test_models_that_are_no_bitnet_are_refused(tmp_path):
    with pytest.raises(ValueError, match="neither BitLinear nor AutoBitLinear"):
        trine.from_bitnet(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="'revision' is for a path"):
        trine.from_bitnet(bitnet_model("bitlinear"), revision="main")
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no quantization_config with quant_method"):
        trine.from_bitnet(tmp_path)
