"""What structured pruning saves, on models of seven kinds with random weights.

Half of the neurons, channels and heads of each are removed, widths in multiples of 8; parameters,
multiply-adds and measured milliseconds of a call before and after. It says nothing of accuracy.

    python -m benchmarks.pruning.sizes
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import nn
from trine.evaluate import alternate
from trine.prune import prune_structured

from benchmarks.table import table_of

TOKENS, PIXELS = 64, 64


def models() -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    import transformers as tf

    ids = torch.randint(1000, (1, TOKENS))
    image = torch.randn(1, 3, PIXELS, PIXELS)
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}
    words = {**sizes, "vocab_size": 1000, "intermediate_size": 1024}
    yield (
        "ResNet",
        tf.ResNetForImageClassification(tf.ResNetConfig(depths=[2, 2, 2, 2])),
        {"pixel_values": image},
    )
    yield (
        "MobileNet",
        tf.MobileNetV2ForImageClassification(tf.MobileNetV2Config()),
        {"pixel_values": image},
    )
    config = tf.ViTConfig(**sizes, intermediate_size=1024, image_size=PIXELS, patch_size=8)
    yield "ViT", tf.ViTForImageClassification(config), {"pixel_values": image}
    yield "BERT", tf.BertForSequenceClassification(tf.BertConfig(**words)), {"input_ids": ids}
    config = tf.GPT2Config(vocab_size=1000, n_embd=256, n_layer=4, n_head=8)
    yield "GPT-2", tf.GPT2LMHeadModel(config), {"input_ids": ids}
    config = tf.LlamaConfig(**words, num_key_value_heads=4)
    yield "Llama", tf.LlamaForCausalLM(config), {"input_ids": ids}
    config = tf.T5Config(
        vocab_size=1000, d_model=256, d_kv=32, d_ff=1024, num_layers=4, num_heads=8
    )
    yield "T5", tf.T5ForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids}


def main() -> None:
    torch.manual_seed(0)
    heads = ("parameters", "left", "MACs", "left", "ms", "ms after", "speed-up")
    table = table_of("half of the neurons, channels and heads", ("model",), heads, ())
    for name, model, inputs in models():
        model.eval()
        small = prune_structured(model, inputs, 0.5)
        report = small.removal_report
        times = alternate({"whole": partial(model, **inputs), "small": partial(small, **inputs)})
        table.add_row(
            name,
            f"{report.parameters_before / 1e6:.2f} M",
            f"{report.parameters_after / report.parameters_before:.0%}",
            f"{report.macs_before / 1e6:.0f} M",
            f"{report.macs_after / report.macs_before:.0%}",
            f"{times['whole'] * 1e3:.2f}",
            f"{times['small'] * 1e3:.2f}",
            f"{times['whole'] / times['small']:.2f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
