"""BitNet models of transformers on trine's kernels."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.bitnet import AutoBitLinear, BitLinear

from trine.compress.layers import copy_model
from trine.compress.save_pretrained import prepare_save_pretrained
from trine.hugging_face.bitnet_file import load_bitnet, without_quantization
from trine.hugging_face.bitnet_weights import codes_of, quantize_online, scale_and_bias
from trine.nn import NormedTernaryLinear, TernaryLinear


def from_bitnet(model_or_path: nn.Module | str | PathLike, **loading: Any) -> PreTrainedModel:
    """A BitNet model of transformers whose layers run on `trine.ops.ternary_linear`.

    The codes are rearranged as integers; nothing is quantised again. The result generates, is saved
    with `trine.save`, and is in evaluation mode.

    It computes what transformers computes, with other roundings: activations are quantised in
    float32 by 127 / absmax of their row (transformers: in the model's dtype where the class is
    BitLinear, and with absmax raised to 1e-5, so that rows below that differ), the integer sums are
    exact, and y is rounded once. In float32 logits agree to about 1e-6 of their norm, but for
    activations that lie within a rounding of the middle between two codes. A layer's own RMSNorm
    (`use_rms_norm`) is rounded once where transformers rounds twice.

    Args:
        model_or_path: a model that transformers loaded or made with its BitNet layers (`BitLinear`
            or `AutoBitLinear`, online or offline), which stays as it is; or a folder or name that
            `from_pretrained` takes, whose packed weights are read as they are: the model never
            exists in float.
        loading: for a path, further arguments of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: the model holds no BitNet layer, the configuration is not one of BitNet, a
            tensor is missing, or a weight or scale has values that do not fit; it is named.
    """
    if not isinstance(model_or_path, nn.Module):
        return load_bitnet(model_or_path, **loading)
    if loading:
        raise ValueError(f"from_bitnet: {sorted(loading)[0]!r} is for a path, not for a model")
    model = model_or_path
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BitLinear | AutoBitLinear)}
    if not layers:
        raise ValueError(
            "from_bitnet: the model holds neither BitLinear nor AutoBitLinear; load it with its "
            "BitNet quantization_config, or use trine.compress on a float model"
        )
    packed = {layer: _pack(name, layer) for name, layer in layers.items()}
    small = copy_model(model, packed).eval()
    without_quantization(small)
    prepare_save_pretrained(small)
    return small


@torch.no_grad()
def _pack(name: str, layer: BitLinear | AutoBitLinear) -> TernaryLinear:
    try:
        if layer.weight.is_meta:
            raise ValueError("the weight is on the meta device; load the model first")
        bias, weight = layer.bias, layer.weight
        if isinstance(layer, AutoBitLinear) and layer.online_quant:
            dtype = weight.dtype
            codes, scale = quantize_online(weight)
        else:
            dtype = layer.weight_scale.dtype
            codes = codes_of(weight)
            divides = isinstance(layer, BitLinear)
            scale, bias = scale_and_bias(layer.weight_scale, bias, divides=divides)
        packed = TernaryLinear.from_codes(codes, scale, bias, dtype=dtype)
        norm = layer.rms_norm
        if norm is None:
            return packed
        return NormedTernaryLinear.from_ternary(packed, norm.weight, norm.variance_epsilon)
    except ValueError as error:
        raise ValueError(f"from_bitnet: layer {name!r}: {error}") from error
