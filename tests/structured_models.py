"""Small random models of seven kinds, and by hand: which layers read what each group makes."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

HIDDEN, HEADS, FEED = 32, 4, 48


@dataclass
class Case:
    model: nn.Module
    inputs: Any
    # Group -> the layers that read it, each with how many of its inputs belong to one unit and, if
    # not 0, at which input the first unit is.
    readers: dict[str, list[tuple]] = field(default_factory=dict)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (inner + self.short(x)).relu()


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Residual(8, 8, 1), Residual(8, 16, 2), Residual(16, 16, 1))
        self.head = nn.Linear(16 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.bn(self.stem(x)).relu())
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def inverted(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    wide = 2 * inputs
    return nn.Sequential(
        nn.Conv2d(inputs, wide, 1, bias=False),
        nn.BatchNorm2d(wide),
        nn.ReLU6(),
        nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
        nn.BatchNorm2d(wide),
        nn.Hardswish(),
        nn.Conv2d(wide, outputs, 1),
    )


def resnet() -> Case:
    stem, last = [("blocks.0.conv1", 1), ("blocks.1.conv1", 1), ("blocks.1.short", 1)], "head"
    readers = {
        "stem": stem,
        "blocks.0.conv1": [("blocks.0.conv2", 1)],
        "blocks.1.conv1": [("blocks.1.conv2", 1)],
        "blocks.1.conv2": [("blocks.2.conv1", 1), (last, 4)],
        "blocks.2.conv1": [("blocks.2.conv2", 1)],
    }
    return Case(_settled(ResNet()), torch.randn(2, 3, 16, 16), readers)


def mobilenet() -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        inverted(8, 12, 1),
        inverted(12, 16, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    readers = {"0": [("1.0", 1)], "1.0": [("1.6", 1)], "1.6": [("2.0", 1)]}
    readers |= {"2.0": [("2.6", 1)], "2.6": [("5", 1)]}
    return Case(_settled(model), torch.randn(2, 3, 16, 16), readers)


def _settled(model: nn.Module) -> nn.Module:
    """With batch norms that are not the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor.data)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def _tokens(length: int = 6) -> Tensor:
    return torch.randint(0, 60, (2, length))


def bert() -> Case:
    tf = pytest.importorskip("transformers")
    config = tf.BertConfig(
        vocab_size=60,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=FEED,
    )
    readers = {}
    for i in range(2):
        at = f"bert.encoder.layer.{i}"
        readers[f"{at}.attention.self.query"] = [(f"{at}.attention.output.dense", 8)]
        readers[f"{at}.intermediate.dense"] = [(f"{at}.output.dense", 1)]
    readers["bert.pooler.dense"] = [("classifier", 1)]
    inputs = {"input_ids": _tokens(), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    inputs["attention_mask"][1, 4:] = 0
    return Case(tf.BertForSequenceClassification(config).eval(), inputs, readers)


def vit() -> Case:
    tf = pytest.importorskip("transformers")
    config = tf.ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=FEED,
        image_size=16,
        patch_size=4,
    )
    readers = {}
    for i in range(2):
        at = f"vit.layers.{i}"
        readers[f"{at}.attention.q_proj"] = [(f"{at}.attention.o_proj", 8)]
        readers[f"{at}.mlp.fc1"] = [(f"{at}.mlp.fc2", 1)]
    model = tf.ViTForImageClassification(config).eval()
    return Case(model, {"pixel_values": torch.randn(2, 3, 16, 16)}, readers)


def gpt2() -> Case:
    tf = pytest.importorskip("transformers")
    config = tf.GPT2Config(
        vocab_size=60,
        n_embd=HIDDEN,
        n_layer=2,
        n_head=HEADS,
        n_inner=FEED,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=None,
    )
    readers = {}
    for i in range(2):
        at = f"transformer.h.{i}"
        readers[f"{at}.attn.c_attn"] = [(f"{at}.attn.c_proj", 8)]
        readers[f"{at}.mlp.c_fc"] = [(f"{at}.mlp.c_proj", 1)]
    return Case(tf.GPT2LMHeadModel(config).eval(), {"input_ids": _tokens()}, readers)


def llama() -> Case:
    tf = pytest.importorskip("transformers")
    config = tf.LlamaConfig(
        vocab_size=60,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=FEED,
        bos_token_id=0,
        eos_token_id=None,
    )
    readers = {}
    for i in range(2):
        at = f"model.layers.{i}"
        # One key-value head of two query heads of 4.
        readers[f"{at}.self_attn.q_proj"] = [(f"{at}.self_attn.o_proj", 8)]
        readers[f"{at}.mlp.gate_proj"] = [(f"{at}.mlp.down_proj", 1)]
    return Case(tf.LlamaForCausalLM(config).eval(), {"input_ids": _tokens()}, readers)


def t5() -> Case:
    tf = pytest.importorskip("transformers")
    config = tf.T5Config(
        vocab_size=60,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=FEED,
        num_layers=2,
        num_heads=HEADS,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )

    # The position bias of the first layer serves all, so a head goes from all of them.
    def heads(side: str, kind: str, place: int) -> list[tuple[str, int]]:
        return [(f"{side}.block.{i}.layer.{place}.{kind}.o", 8) for i in range(2)]

    readers = {
        "encoder.block.0.layer.0.SelfAttention.q": heads("encoder", "SelfAttention", 0),
        "decoder.block.0.layer.0.SelfAttention.q": heads("decoder", "SelfAttention", 0),
        "decoder.block.0.layer.1.EncDecAttention.q": heads("decoder", "EncDecAttention", 1),
    }
    for side, place in (("encoder", 1), ("decoder", 2)):
        for i in range(2):
            at = f"{side}.block.{i}.layer.{place}.DenseReluDense"
            readers[f"{at}.wi_0"] = [(f"{at}.wo", 1)]
    inputs = {"input_ids": _tokens(), "decoder_input_ids": _tokens(4)}
    return Case(tf.T5ForConditionalGeneration(config).eval(), inputs, readers)


CASES = {f.__name__: f for f in (resnet, mobilenet, vit, bert, gpt2, llama, t5)}


def case(name: str, dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(0)
    made = CASES[name]()
    made.model.to(dtype)
    with torch.no_grad():  # biases that start at zero would hide a bias that is left behind
        for key, parameter in made.model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.1)
    if isinstance(made.inputs, Tensor):
        made.inputs = made.inputs.to(dtype)
    elif "pixel_values" in made.inputs:
        made.inputs["pixel_values"] = made.inputs["pixel_values"].to(dtype)
    return made


def call(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        out = model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
    return out if isinstance(out, Tensor) else out["logits"]


def masked(found: Case, removed: dict[str, tuple[int, ...]]) -> Tensor:
    """The whole model's output, with zeros where its layers read what was removed: by hand."""
    handles = []
    for group, units in removed.items():
        for layer, width, *start in found.readers[group]:
            module = found.model.get_submodule(layer)
            dim = 1 if isinstance(module, nn.modules.conv._ConvNd) else -1
            places = [sum(start) + u * width + i for u in units for i in range(width)]
            places = torch.tensor(places, dtype=torch.long)

            def zero(_, args, places=places, dim=dim):
                return (args[0].index_fill(dim, places, 0),)

            handles.append(module.register_forward_pre_hook(zero))
    out = call(found.model, found.inputs)
    for handle in handles:
        handle.remove()
    return out
