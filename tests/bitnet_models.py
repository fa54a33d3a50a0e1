"""Small random BitNet models of transformers, in every form that it writes."""

import torch
from torch import nn
from transformers import BitNetConfig, BitNetForCausalLM
from transformers.integrations.bitnet import (
    AutoBitLinear,
    BitLinear,
    pack_weights,
    replace_with_bitnet_linear,
)
from transformers.utils.quantization_config import BitNetQuantConfig

# linear_class, quantization_mode, whether the file holds packed weights, use_rms_norm
FORMS = {
    "bitlinear": ("bitlinear", "offline", True, False),
    "bitlinear with norm": ("bitlinear", "offline", True, True),
    "autobitlinear packed": ("autobitlinear", "offline", True, False),
    "autobitlinear unpacked": ("autobitlinear", "offline", False, False),
    "autobitlinear online": ("autobitlinear", "online", False, False),
    "autobitlinear online with norm": ("autobitlinear", "online", False, True),
}


def bitnet_model(
    form: str, dtype: torch.dtype = torch.float32, *, bias: bool = True, **config: int
) -> BitNetForCausalLM:
    """A model with transformers' BitNet layers, as a checkpoint of that form holds them."""
    linear_class, mode, packed, use_rms_norm = FORMS[form]
    shape = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = BitNetForCausalLM(
        BitNetConfig(**{**shape, **config}, bos_token_id=1, eos_token_id=None, attention_bias=bias)
    ).to(dtype)
    quantization = BitNetQuantConfig(
        modules_to_not_convert=["lm_head"],
        linear_class=linear_class,
        quantization_mode=mode,
        use_rms_norm=use_rms_norm,
    )
    floats = {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    replace_with_bitnet_linear(model, ["lm_head"], quantization)
    for name, layer in model.named_modules():
        if isinstance(layer, BitLinear | AutoBitLinear):
            _fill(layer, floats[name], packed)
    model.config.quantization_config = quantization
    return model.eval()


def _fill(layer: BitLinear | AutoBitLinear, weight: torch.Tensor, packed: bool) -> None:
    dtype = weight.dtype
    if isinstance(layer, AutoBitLinear) and layer.online_quant:
        layer.weight = nn.Parameter(weight)
    else:
        codes = torch.randint(-1, 2, weight.shape)
        del layer.weight
        stored = pack_weights(codes) if packed else codes.to(dtype)
        layer.register_buffer("weight", stored)
        scale = torch.rand(1) / 20 + 0.02
        layer.weight_scale = (1 / scale if isinstance(layer, BitLinear) else scale).to(dtype)
    if layer.bias is not None:
        bias = torch.randn(layer.out_features, dtype=dtype)
        layer.bias = bias if isinstance(layer, BitLinear) else nn.Parameter(bias)
    if layer.rms_norm is not None:
        layer.rms_norm.weight = nn.Parameter(torch.rand(layer.in_features).to(dtype) + 0.5)
