"""trine as a quantisation method of transformers: quantise on load, save, read equal bits again."""

import json

import pytest
import safetensors.torch
import torch
import transformers as hf
import trine
from bitnet_models import bitnet_model
from torch import nn
from trine import TrineConfig
from trine.nn import Int8Linear, PackedLinear, Sparse24Linear, TernaryLinear, pack_linear

IDS = torch.randint(0, 97, (2, 7), generator=torch.Generator().manual_seed(1))

_LLAMA = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CONFIGS = {
    "llama": hf.LlamaConfig(**_LLAMA, attention_bias=True),
    "llama tied": hf.LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "gpt2": hf.GPT2Config(
        vocab_size=97, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=None
    ),
    "bitnet": hf.BitNetConfig(**_LLAMA),
}
LAYERS = {"llama": 14, "llama tied": 14, "gpt2": 8, "bitnet": 14}


def _written(folder, name: str, dtype=torch.float32) -> hf.PreTrainedModel:
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype)
    model.save_pretrained(folder)
    return model.eval()


def _load(folder, *args, **kwargs) -> hf.PreTrainedModel:
    return hf.AutoModelForCausalLM.from_pretrained(folder, *args, **kwargs)


def _packed(model: nn.Module) -> dict[str, PackedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def _tokens(model: nn.Module, **kwargs) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, **kwargs)


def _same_state(a: nn.Module, b: nn.Module) -> None:
    states = a.state_dict(), b.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        assert tensor.dtype == states[1][key].dtype, key
        assert torch.equal(tensor, states[1][key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_quantised_on_load_saved_in_shards_and_read_again(name, dtype, tmp_path):
    floats = _written(tmp_path / "float", name, dtype)
    model = _load(
        tmp_path / "float",
        quantization_config=TrineConfig("int8"),
        device_map="cpu",
        dtype=dtype,
    )
    layers = _packed(model)
    assert len(layers) == LAYERS[name]
    assert type(model.lm_head) is nn.Linear
    if name in ("llama tied", "gpt2"):
        assert model.lm_head.weight is model.get_input_embeddings().weight
    for path, layer in layers.items():
        expected = pack_linear(floats.get_submodule(path), "int8")
        assert layer.weight_scale.dtype == torch.float32
        assert torch.equal(layer.packed_weight, expected.packed_weight)
        assert torch.equal(layer.weight_scale, expected.weight_scale)
    # In eight bits a random model still says nearly the same.
    exact = _logits(floats).float()
    assert (_logits(model).float() - exact).norm() < 0.05 * exact.norm()

    model.save_pretrained(tmp_path / "small", max_shard_size="40KB")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    again = _load(tmp_path / "small", device_map="cpu")
    assert again.dtype == dtype
    _same_state(model, again)
    assert torch.equal(_logits(again), _logits(model))
    assert torch.equal(_tokens(again), _tokens(again, use_cache=False))
    trine.save(again, tmp_path / "small.trine")
    assert torch.equal(_logits(trine.load(tmp_path / "small.trine")), _logits(model))


@pytest.mark.parametrize(
    "choice", ["int8-weight", "ternary-g64", "sparse24", "sparse24-int8", "ternary24"]
)
def test_every_kind_comes_back_with_equal_bits(choice, tmp_path):
    _written(tmp_path / "float", "gpt2", torch.bfloat16)
    config = TrineConfig(choice)
    model = _load(tmp_path / "float", quantization_config=config)
    assert config.layers is None  # the caller's object stays as it was
    model.save_pretrained(tmp_path / "small")
    again = _load(tmp_path / "small")
    assert [type(m) for m in _packed(again).values()] == [type(m) for m in _packed(model).values()]
    _same_state(model, again)


def test_patterns_and_modules_to_not_convert_choose(tmp_path):
    _written(tmp_path, "llama")
    config = TrineConfig(
        {"*.mlp.down_proj": "sparse24", "*.mlp.*": "ternary", "*": "int8"},
        modules_to_not_convert=["model.layers.0", "o_proj"],
    )
    model = _load(tmp_path, quantization_config=config)
    kinds = {name: type(layer) for name, layer in _packed(model).items()}
    block = "model.layers.1"
    assert kinds == {
        **{f"{block}.self_attn.{key}_proj": Int8Linear for key in "qkv"},
        f"{block}.mlp.gate_proj": TernaryLinear,
        f"{block}.mlp.up_proj": TernaryLinear,
        f"{block}.mlp.down_proj": Sparse24Linear,
        "lm_head": Int8Linear,
    }


def test_with_and_without_the_head(tmp_path):
    _written(tmp_path / "float", "llama")
    _load(tmp_path / "float", quantization_config=TrineConfig()).save_pretrained(tmp_path / "lm")
    body = hf.AutoModel.from_pretrained(tmp_path / "lm")
    assert len(_packed(body)) == 14
    body.save_pretrained(tmp_path / "body")
    with_head = _load(tmp_path / "body")  # its head is new and float
    assert torch.equal(with_head.model(IDS)[0], body(IDS)[0])


def test_what_compress_and_from_bitnet_make_is_saved_by_save_pretrained(tmp_path):
    model = hf.AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    small = trine.compress(model, trine.Recipe("int8", prefer="size"), {"input_ids": IDS})
    with torch.compiler.set_stance("force_eager"):
        bitnet = trine.from_bitnet(bitnet_model("bitlinear with norm"))
    for number, packed in enumerate((small, bitnet)):
        packed.save_pretrained(tmp_path / str(number))
        again = _load(tmp_path / str(number))
        _same_state(packed, again)
        assert torch.equal(_logits(again), _logits(packed))
    assert getattr(model.config, "quantization_config", None) is None  # untouched


def _small(folder):
    """A quantised checkpoint in one file, and its tensors."""
    _written(folder / "float", "llama", torch.bfloat16)
    _load(folder / "float", quantization_config=TrineConfig()).save_pretrained(folder / "small")
    file = folder / "small" / "model.safetensors"
    return file, safetensors.torch.load_file(file)


@pytest.mark.parametrize("key", ["weight_scale", "packed_weight", "bias"])
def test_a_missing_tensor_is_an_error_that_names_it(key, tmp_path):
    file, tensors = _small(tmp_path)
    name = f"model.layers.1.self_attn.q_proj.{key}"
    del tensors[name]
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} is missing in the checkpoint"):
        _load(tmp_path / "small")


def test_a_scale_that_was_cast_is_an_error(tmp_path):
    file, tensors = _small(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight_scale"
    tensors[name] = tensors[name].bfloat16()
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} is BF16 .* expected F32"):
        _load(tmp_path / "small")


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    _small(tmp_path)
    config = tmp_path / "small" / "config.json"
    data = json.loads(config.read_text())
    layers = data["quantization_config"]["layers"]
    layers["model.layers.7.mlp.up_proj"] = layers["model.layers.1.mlp.up_proj"]
    config.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"'model\.layers\.7\.mlp\.up_proj', but LlamaForCausalLM"):
        _load(tmp_path / "small")
    data["quantization_config"]["layers"] = None
    config.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="quantization_config names no layers"):
        _load(tmp_path / "small")


def test_weights_that_cannot_be_quantised_are_refused_by_layer(tmp_path):
    model = _written(tmp_path, "gpt2")
    with pytest.raises(ValueError, match="no layer of the model is to be quantised"):
        _load(tmp_path, quantization_config=TrineConfig({"*.nothing": "int8"}))
    with pytest.raises(
        ValueError, match=r"'transformer\.h\.0\.attn\.c_attn'.* divides in_features"
    ):
        _load(tmp_path, quantization_config=TrineConfig("ternary-g128"))
    model.transformer.h[1].mlp.c_fc.weight.data[3, 4] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'transformer\.h\.1\.mlp\.c_fc'.* holds NaN"):
        _load(tmp_path, quantization_config=TrineConfig())


def test_a_configuration_is_checked():
    with pytest.raises(ValueError, match="linear is 'int3'"):
        TrineConfig("int3")
    with pytest.raises(ValueError, match="'int8-static' needs training or data"):
        TrineConfig({"*": "int8-static"})
    with pytest.raises(ValueError, match="must be a list of names"):
        TrineConfig(modules_to_not_convert="lm_head")
    with pytest.raises(ValueError, match="layer 'a' is of kind 'int3'"):
        TrineConfig(layers={"a": {"kind": "int3"}})
    with pytest.raises(ValueError, match="quant_method is 'awq'"):
        TrineConfig(quant_method="awq")
