"""The quantization_config of transformers that names trine's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from trine.compress.layers import signature
from trine.compress.recipe import TRAINED, Recipe
from trine.nn import PackedLinear, layer_kinds

METHOD = "trine"


@register_quantization_config(METHOD)
class TrineConfig(QuantizationConfigMixin):
    """What `from_pretrained(..., quantization_config=TrineConfig(...))` makes of linear layers.

    Args:
        linear: as in `trine.Recipe`: one choice for every layer, of those that need no training
            ("int8", "int8-weight", "ternary", "ternary-twn", "sparse24", "sparse24-int8",
            "ternary24", and with a group size, as in "int8-weight-g128"), or a
            mapping from patterns of layer names to choices.
        modules_to_not_convert: names of modules that stay float, as in transformers' other
            configurations; None is transformers' own choice, the output layer and tied weights.
        layers: what the layers of a checkpoint are, by name: kind and options. Written when a model
            is quantised; not for use by hand.

    Raises ValueError for an unknown choice, pattern or kind.
    """

    def __init__(
        self,
        linear: str | Mapping[str, str] = "int8",
        modules_to_not_convert: Sequence[str] | None = None,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        if quant_method != METHOD:
            raise ValueError(
                f"TrineConfig: quant_method is {quant_method!r}; it must be {METHOD!r}"
            )
        if isinstance(modules_to_not_convert, str):
            raise ValueError(
                "TrineConfig: modules_to_not_convert is a string; it must be a list of names"
            )
        for name, entry in (layers or {}).items():
            if entry.get("kind") not in layer_kinds:
                raise ValueError(
                    f"TrineConfig: layer {name!r} is of kind {entry.get('kind')!r}; known are "
                    f"{', '.join(layer_kinds)}"
                )
        self.quant_method = METHOD
        self.linear = Recipe(linear).linear
        choices = (linear,) if isinstance(linear, str) else linear.values()
        for choice in choices:
            if choice in TRAINED:
                raise ValueError(
                    f"TrineConfig: {choice!r} needs training or data; use trine.quantize, whose "
                    "results save_pretrained keeps, too"
                )
        self.modules_to_not_convert = modules_to_not_convert and list(modules_to_not_convert)
        self.layers = layers and {name: dict(entry) for name, entry in layers.items()}


def layers_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What `TrineConfig.layers` says of a model with packed layers."""
    return {
        name: {"kind": layer.kind, **_options(layer)}
        for name, layer in model.named_modules()
        if isinstance(layer, PackedLinear)
    }


def _options(layer: PackedLinear) -> dict[str, Any]:
    of_every_linear = ("in_features", "out_features", "bias", "dtype")
    return {key: value for key, value in layer.config().items() if key not in of_every_linear}


def empty_layer(linear: nn.Module, entry: Mapping[str, Any]) -> PackedLinear:
    """The packed layer of `entry` in the shape of a float one, without values."""
    k, n, bias = signature(linear)
    options = {key: value for key, value in entry.items() if key != "kind"}
    kind = layer_kinds[entry["kind"]]
    return kind(k, n, bias, **options, device="meta", dtype=linear.weight.dtype)


def describe_packed_layers(model: nn.Module) -> None:
    """Give every model of transformers inside `model` the configuration of its packed layers.

    Its save_pretrained then writes what from_pretrained reads. Where one holds another with the
    same configuration the names are those of the outer one, which reading the inner one allows for.
    """
    described: set[int] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and id(module.config) not in described:
            described.add(id(module.config))
            stored, layers = getattr(module.config, "quantization_config", None), layers_of(module)
            if isinstance(stored, TrineConfig) and layers:
                choices = (stored.linear, stored.modules_to_not_convert)
                module.config.quantization_config = TrineConfig(*choices, layers)
            elif stored is None and layers:
                module.config.quantization_config = TrineConfig("float", layers=layers)
