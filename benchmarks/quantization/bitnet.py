"""BitNet b1.58 2B in its real shapes, with random codes: tokens per second beside transformers.

The model is transformers' BitNetForCausalLM with 30 layers of hidden size 2560 in bfloat16, once
with each of its two linear classes: AutoBitLinear, which microsoft/bitnet-b1.58-2B-4T names (it
unpacks the weights once, to bfloat16), and BitLinear (which unpacks them in every call).
`trine.from_bitnet` makes the other one of it. A token is decoded with a KV cache, both models
taking turns in one process; a prompt is read whole, without the output layer. It takes 7 GB of
memory; with --quick, 6 layers and 3 GB.

    python -m benchmarks.quantization.bitnet
    python -m benchmarks.quantization.bitnet --quick
"""

from collections.abc import Callable
from typing import Any

import torch
import trine
from torch import nn
from transformers import BitNetConfig, BitNetForCausalLM
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, replace_with_bitnet_linear
from transformers.utils.quantization_config import BitNetQuantConfig
from trine.evaluate import alternate
from trine.nn import Int8Linear

from benchmarks.study import Row, Study, parse_arguments

_PARTS = ("token", "prompt")
_RATIO = "times as fast as transformers"

LAYERS, LAYERS_QUICK = 30, 6
CONTEXT = 32  # tokens in the cache
PROMPT = 128
GOAL = 5.0
WRONG = 0.3  # of random weights roundings are multiplied: two bfloat16 models differ by a tenth


def build(linear_class: str, layers: int) -> BitNetForCausalLM:
    """The model with random codes; it never exists in float."""
    config = BitNetConfig(num_hidden_layers=layers, tie_word_embeddings=True)
    with torch.device("meta"):
        model = BitNetForCausalLM(config).bfloat16()
    quantization = BitNetQuantConfig(["lm_head"], linear_class=linear_class)
    replace_with_bitnet_linear(model, ["lm_head"], quantization)
    for module in model.modules():
        if isinstance(module, BitLinear | AutoBitLinear):
            _fill(module)
        elif "RMSNorm" in type(module).__name__:
            module.weight = nn.Parameter(torch.ones_like(module.weight, device="cpu"))
    embedding = torch.randn(config.vocab_size, config.hidden_size, dtype=torch.bfloat16) / 50
    model.model.embed_tokens.weight = nn.Parameter(embedding)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval().requires_grad_(False)


def _fill(layer: BitLinear | AutoBitLinear) -> None:
    if isinstance(layer, BitLinear):
        bits = torch.randint(256, layer.weight.shape, dtype=torch.uint8)
        layer.weight = bits - (bits & bits >> 1 & 0b01010101)  # two bits of a code are never 3
        layer.weight_scale = torch.tensor([50.0], dtype=torch.bfloat16)
        return
    codes = torch.randint(-1, 2, layer.weight.shape, dtype=torch.int8)
    layer.weight = nn.Parameter(codes.bfloat16(), requires_grad=False)
    layer.weight_scale = torch.tensor([0.02], dtype=torch.bfloat16)


def bytes_of(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def decoding(model: nn.Module) -> Callable[[], torch.Tensor]:
    """A call that decodes one token behind CONTEXT others and leaves the cache as it was."""
    tokens = torch.arange(CONTEXT + 1)[None]
    cache = model(tokens[:, :-1], use_cache=True).past_key_values

    def decode() -> torch.Tensor:
        logits = model(tokens[:, -1:], past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return decode


@torch.inference_mode()
def compare(linear_class: str, layers: int) -> dict[str, Any]:
    """Seconds of a token and of a prompt, bytes, and how far the logits are apart."""
    torch.manual_seed(0)
    models = {"transformers": build(linear_class, layers)}
    models["trine"] = trine.from_bitnet(models["transformers"])
    calls = {name: decoding(model) for name, model in models.items()}
    logits = {name: call().float() for name, call in calls.items()}
    distance = (logits["trine"] - logits["transformers"]).norm() / logits["transformers"].norm()
    if not distance < WRONG:
        raise RuntimeError(f"{linear_class}: the logits differ by {distance:.2g} of their norm")

    slow = linear_class == "bitlinear"
    found = {"distance": distance.item()}
    found["token"] = alternate(calls, rounds=1 if slow else 9)
    prompt = torch.arange(PROMPT)[None]
    reading = {name: lambda body=model.model: body(prompt) for name, model in models.items()}
    found["prompt"] = alternate(reading, rounds=1 if slow else 3)
    found["bytes"] = {name: bytes_of(model) for name, model in models.items()}
    if not slow:
        found["int8 head"] = _with_int8_head(models["trine"])
    return found


def _with_int8_head(model: nn.Module) -> float:
    """Seconds of a token where the output layer, which BitNet leaves in bfloat16, is INT8."""
    model.lm_head = Int8Linear.from_linear(model.lm_head)
    return alternate({"": decoding(model)}, rounds=9)[""]


def rows_of(name: str, found: dict[str, Any], goal: float | None) -> list[Row]:
    rows = []
    for who in ("transformers", "trine"):
        times = {"token": found["token"][who] * 1e3, "prompt": found["prompt"][who] * 1e3}
        speed = 1 / found["token"][who]
        size = found["bytes"][who]
        rows.append(Row(f"{name}: {who}", "tokens/s", speed, bytes=size, latency_ms=times))
    if "int8 head" in found:
        seconds = found["int8 head"]
        row = Row(f"{name}: trine, output layer INT8", "tokens/s", 1 / seconds)
        rows.append(row)
    ratios = {part: found[part]["transformers"] / found[part]["trine"] for part in _PARTS}
    met = goal is None or ratios["token"] >= goal
    rows.append(Row(f"{name}: a token", _RATIO, ratios["token"], goal=goal, met=met))
    rows.append(Row(f"{name}: a prompt of {PROMPT}", _RATIO, ratios["prompt"]))
    rows.append(Row(f"{name}: logits", "distance / norm", found["distance"]))
    return rows


def main(given: list[str] | None = None) -> None:
    arguments = parse_arguments(__doc__, "benchmarks.quantization.bitnet", given)
    layers = LAYERS_QUICK if arguments.quick else LAYERS
    classes = {"autobitlinear": "AutoBitLinear", "bitlinear": "BitLinear"}
    about = {"layers": layers}
    study = Study("quantization-bitnet", arguments, len(classes), about, seeds=1)
    rows = []
    for linear_class, name in classes.items():
        found = study.part(name, lambda linear_class=linear_class: compare(linear_class, layers))
        # With few layers the output layer, which both models share, takes most of the time.
        rows += rows_of(name, found, None if arguments.quick else GOAL)
    study.finish(
        rows,
        notes=f"BitNet b1.58 2B's shapes with random codes, {layers} layers, bfloat16, "
        f"{torch.get_num_threads()} threads; speed is a median over alternating calls of one run. "
        "bytes: of the model's tensors; AutoBitLinear's are unpacked. Its logits differ more "
        "because it rounds the activations to bfloat16 once they are quantised; trine's products "
        "are exact.",
    )


if __name__ == "__main__":
    main()
