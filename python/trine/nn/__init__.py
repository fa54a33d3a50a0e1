"""Layers with compressed weights, drop-in for those of `torch.nn`."""

from torch import nn

from trine.nn.clustered import ClusteredEmbedding, ClusteredLinear
from trine.nn.int8 import Int8Linear
from trine.nn.int8_conv import Int8Conv2d
from trine.nn.int8_embedding import Int8Embedding
from trine.nn.int8_weight import Int8WeightLinear
from trine.nn.low_rank import LowRankConv2d, LowRankLinear
from trine.nn.low_rank_embedding import LowRankEmbedding
from trine.nn.normed_ternary import NormedTernaryLinear
from trine.nn.packed import PackedLayer, PackedLinear
from trine.nn.quantizing_norm import QuantizingLayerNorm, QuantizingRMSNorm
from trine.nn.separate_attention import SeparateAttention
from trine.nn.sparse24 import Sparse24Linear
from trine.nn.ternary import TernaryLinear
from trine.nn.ternary24 import Ternary24Linear
from trine.nn.two_scales import TwoScaleTernaryLinear
from trine.quantize.groups import split_group

__all__ = [
    "ClusteredEmbedding",
    "ClusteredLinear",
    "Int8Conv2d",
    "Int8Embedding",
    "Int8Linear",
    "Int8WeightLinear",
    "LowRankConv2d",
    "LowRankEmbedding",
    "LowRankLinear",
    "NormedTernaryLinear",
    "PackedLayer",
    "PackedLinear",
    "QuantizingLayerNorm",
    "QuantizingRMSNorm",
    "SeparateAttention",
    "Sparse24Linear",
    "Ternary24Linear",
    "TernaryLinear",
    "TwoScaleTernaryLinear",
    "layer_kinds",
    "pack_linear",
]

layer_kinds: dict[str, type[PackedLayer]] = {
    layer.kind: layer
    for layer in (
        TernaryLinear,
        TwoScaleTernaryLinear,
        NormedTernaryLinear,
        Int8Linear,
        Int8WeightLinear,
        Int8Embedding,
        Int8Conv2d,
        Sparse24Linear,
        Ternary24Linear,
    )
}

# What a recipe may choose for a layer: the class, and the options of its `from_linear`.
_CHOICES: dict[str, tuple[type[PackedLinear], dict[str, str]]] = {
    "int8": (Int8Linear, {}),
    "int8-weight": (Int8WeightLinear, {}),
    "ternary": (TernaryLinear, {}),
    "ternary-twn": (TernaryLinear, {"rule": "threshold"}),
    "sparse24": (Sparse24Linear, {"values": "float"}),
    "sparse24-int8": (Sparse24Linear, {"values": "int8"}),
    "ternary24": (Ternary24Linear, {}),
}


def pack_linear(linear: nn.Module, choice: str) -> PackedLinear:
    """Pack a dense layer as a recipe's `choice` says.

    Args:
        linear: torch.nn.Linear or transformers' Conv1D, float32, bfloat16 or float16.
        choice: "int8", "int8-weight", "ternary", "ternary-twn", "sparse24", "sparse24-int8" or
            "ternary24"; "int8-weight", "ternary" and "ternary-twn" also with a group size, as in
            "ternary-g128".

    Raises ValueError for an unknown choice, and what `from_linear` raises.
    """
    base, group = split_group(choice)
    if base not in _CHOICES:
        raise ValueError(
            f"pack_linear: {choice!r} is not one of {', '.join(_CHOICES)}, the choices for a layer "
            "that was trained in float"
        )
    layer, options = _CHOICES[base]
    return layer.from_linear(linear, **options, **({} if group is None else {"group": group}))
