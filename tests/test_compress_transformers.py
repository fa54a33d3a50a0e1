"""Hugging Face models, small and random: compress, save, load with and without a factory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import run_checkpoints
import torch
import transformers as hf
import trine
from fake_timers import says
from torch import nn
from trine import Recipe
from trine.nn.packed import is_conv1d

TESTS = Path(__file__).parent
TOKENS = {
    "input_ids": torch.arange(14).reshape(2, 7) % 50,
    "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
}


def bert() -> nn.Module:
    config = hf.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=20,
    )
    return hf.BertForMaskedLM(config)


def vit() -> nn.Module:
    config = hf.ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=3,
    )
    return hf.ViTForImageClassification(config)


def gpt2() -> nn.Module:
    config = hf.GPT2Config(vocab_size=50, n_positions=20, n_embd=32, n_layer=2, n_head=4)
    return hf.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = hf.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=20,
        attn_implementation="eager",
    )
    return hf.LlamaForCausalLM(config)


def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=50,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    return hf.T5ForConditionalGeneration(config)


FACTORIES = {"bert": bert, "vit": vit, "gpt2": gpt2, "llama": llama, "t5": t5}
INPUTS = {
    "bert": TOKENS,
    "vit": {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)},
    "gpt2": TOKENS,
    "llama": TOKENS,
    "t5": {**TOKENS, "decoder_input_ids": torch.tensor([[0, 5, 6], [0, 7, 8]])},
}
# How many linear layers there are, and the names of those that are tied to an embedding.
LAYERS = {"bert": 14, "vit": 13, "gpt2": 9, "llama": 15, "t5": 37}
TIED = {"bert": {"cls.predictions.decoder"}, "gpt2": {"lm_head"}, "t5": {"lm_head"}}


@pytest.fixture(params=FACTORIES)
def name(request) -> str:
    return request.param


def compressed(name: str, model: nn.Module, recipe: Recipe | None = None) -> nn.Module:
    return trine.compress(model, recipe or Recipe(), INPUTS[name], timer=says(2))


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | trine.nn.PackedLinear) or is_conv1d(module)


def test_every_layer_that_is_not_tied_is_swapped_and_the_output_is_close(name):
    model = FACTORIES[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = run_checkpoints.run(model.eval(), INPUTS[name])[0]
    small = compressed(name, model.train())

    kept = {row.name: row.reason for row in small.report.layers if not row.swapped}
    assert kept == dict.fromkeys(
        TIED.get(name, ()), "its weight or bias is shared with another module"
    )
    assert len(small.report.layers) == LAYERS[name]
    assert small.report.model_bytes_after < small.report.model_bytes_before
    # Rounding to int8 costs about a percent of a layer's output, and less than a tenth over all.
    difference = run_checkpoints.run(small, INPUTS[name])[0] - expected
    assert 0 < difference.norm() / expected.norm() < 0.1

    assert [key for key, _ in small.named_modules()] == [key for key, _ in model.named_modules()]
    assert model.training
    assert not small.training
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert all(not is_linear(m) or not m._forward_pre_hooks for m in model.modules())


def test_ties_hold_in_the_copy(name):
    model = FACTORIES[name]()
    small = compressed(name, model)
    for tied in TIED.get(name, ()):
        weight = small.get_submodule(tied).weight
        assert weight is small.get_input_embeddings().weight
        assert weight is not model.get_submodule(tied).weight


def test_hooks_hold_in_the_copy_alone(name):
    model, seen = FACTORIES[name](), []
    layers = [key for key, module in model.named_modules() if is_linear(module)]
    for key in layers:
        model.get_submodule(key).register_forward_hook(lambda m, *_: seen.append(m))
    small = compressed(name, model)
    seen.clear()
    run_checkpoints.run(small, INPUTS[name])
    assert {id(module) for module in seen} == {id(small.get_submodule(key)) for key in layers}


@pytest.mark.parametrize(
    ("choice", "dtype"),
    [
        ("int8", torch.bfloat16),
        ("ternary", torch.float32),
        ("sparse24", torch.bfloat16),
        ("sparse24-int8", torch.float32),
    ],
)
def test_the_same_bits_after_loading(tmp_path, name, choice, dtype):
    inputs = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in INPUTS[name].items()
    }
    model = FACTORIES[name]().to(dtype)
    small = trine.compress(model, Recipe(choice), inputs, timer=says(2))
    trine.save(small, tmp_path / "a.trine")
    expected = run_checkpoints.run(small, inputs)
    assert expected[0].dtype == dtype
    for like in (None, lambda: FACTORIES[name]().to(dtype)):
        again = trine.load(tmp_path / "a.trine", like=like)
        assert type(again) is type(model)
        assert again.report == small.report
        for mine, others in (
            (again.named_buffers, small.named_buffers),
            (again.named_parameters, small.named_parameters),
        ):
            torch.testing.assert_close(dict(mine()), dict(others()), rtol=0, atol=0)
        assert all(map(torch.equal, run_checkpoints.run(again, inputs), expected))


def test_save_pretrained_writes_what_from_pretrained_reads(tmp_path):
    small = compressed("bert", bert())
    trine.save(small, tmp_path / "a.trine")
    qat = trine.quantize.prepare_qat(bert(), Recipe())
    models = (small, small.bert, trine.load(tmp_path / "a.trine"), trine.convert(qat))
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
        again = type(model).from_pretrained(tmp_path / str(number)).state_dict()
        for key, tensor in model.state_dict().items():  # BertModel gets a new pooler beside these
            torch.testing.assert_close(again[key], tensor, rtol=0, atol=0)
    small = compressed("bert", bert(), Recipe("float"))
    small.save_pretrained(tmp_path / "folder")
    again = hf.BertForMaskedLM.from_pretrained(tmp_path / "folder")
    torch.testing.assert_close(again.state_dict(), small.state_dict(), rtol=0, atol=0)


def test_save_pretrained_that_would_lose_the_packed_layers_is_refused(tmp_path):
    of_another_method = bert()
    of_another_method.config.quantization_config = {"quant_method": "awq"}
    changed = bert()
    changed._trine_edits = [("bert", {"attributes": {"x": 1}})]
    for model in (of_another_method, changed):
        small = compressed("bert", model)
        with pytest.raises(ValueError, match=r"use trine\.save and trine\.load"):
            small.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_the_same_bits_in_a_fresh_process(tmp_path):
    expected = {}
    for name, factory in FACTORIES.items():
        small = compressed(name, factory())
        trine.save(small, tmp_path / f"{name}.trine")
        torch.save(INPUTS[name], tmp_path / f"{name}.inputs")
        expected[name] = run_checkpoints.run(small, INPUTS[name])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    threads = str(torch.get_num_threads())
    run = [sys.executable, TESTS / "run_checkpoints.py", tmp_path, threads]
    subprocess.run(run, check=True, env=environment)
    for name, outputs in expected.items():
        again = torch.load(tmp_path / f"{name}.outputs{threads}")
        assert all(map(torch.equal, again, outputs)), name


def test_what_was_set_beside_the_weights_is_loaded_without_a_factory(tmp_path):
    model = llama()
    model.generation_config.max_new_tokens = 3
    model.generation_config.do_sample = False
    trine.save(compressed("llama", model), tmp_path / "a.trine")
    again = trine.load(tmp_path / "a.trine")
    assert again.config._attn_implementation == "eager"
    assert again.generation_config.max_new_tokens == 3
    tokens = TOKENS["input_ids"][:1]
    assert again.generate(tokens).shape == (1, tokens.shape[1] + 3)


def test_a_model_that_differs_from_its_configuration_is_rebuilt(tmp_path):
    def changed() -> nn.Module:
        model = bert()
        model.cls = nn.Linear(32, 5)
        return model

    small = compressed("bert", changed())
    trine.save(small, tmp_path / "a.trine")
    expected = run_checkpoints.run(small, TOKENS)[0]
    for like in (None, changed):
        again = trine.load(tmp_path / "a.trine", like=like)
        assert torch.equal(run_checkpoints.run(again, TOKENS)[0], expected)


def test_a_class_of_the_users_own_needs_a_factory(tmp_path):
    class Own(hf.BertModel):
        pass

    trine.save(Own(bert().config), tmp_path / "a.trine")
    with pytest.raises(ValueError, match="pass like="):
        trine.load(tmp_path / "a.trine")


def test_a_model_that_cannot_be_built_without_values_needs_a_factory(tmp_path, monkeypatch):
    class Reads(hf.BertModel):
        def __init__(self, config):
            super().__init__(config)
            self.one = torch.ones(1).item()

    monkeypatch.setattr(hf, "Reads", Reads, raising=False)
    trine.save(Reads(bert().config), tmp_path / "a.trine")
    with pytest.raises(ValueError, match="pass like="):
        trine.load(tmp_path / "a.trine")
    trine.load(tmp_path / "a.trine", like=lambda: Reads(bert().config))


def test_rows_are_counted_over_batch_and_sequence():
    samples = [dict(TOKENS), {"input_ids": torch.zeros(1, 1, dtype=torch.long)}]
    small = trine.compress(llama(), Recipe(), samples, timer=says(2))
    timings = small.report.layers[0].timings
    assert [(t.rows, t.calls) for t in timings] == [(14, 1), (1, 1)]
