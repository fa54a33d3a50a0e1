"""The quantization_config of transformers that names trine's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from trine.compress.layers import float_layer
from trine.compress.recipe import TRAINED, Recipe
from trine.hugging_face.ties import declare_ties
from trine.nn import PackedLayer, layer_kinds

METHOD = "trine"


@register_quantization_config(METHOD)
class TrineConfig(QuantizationConfigMixin):
    """What `from_pretrained(..., quantization_config=TrineConfig(...))` makes of a model.

    Args:
        linear: as in `trine.Recipe`: one choice for every layer, of those that need no training
            ("int8", "int8-weight", "ternary", "ternary-twn", "sparse24", "sparse24-int8",
            "ternary24", and with a group size, as in "int8-weight-g128"), or a
            mapping from patterns of layer names to choices.
        embedding: the same for nn.Embedding: "int8" or "float". Where its table is tied to the
            output layer both are packed and share it, if `linear` says "int8" for that layer.
        modules_to_not_convert: names of modules that stay float, as in transformers' other
            configurations; None is transformers' own choice, the output layer and tied weights
            (of linear layers; `embedding` decides for embeddings and what is tied to them).
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
        embedding: str | Mapping[str, str] = "float",
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
        recipe = Recipe(linear, embedding=embedding)
        self.linear, self.embedding = recipe.linear, recipe.embedding
        choices = (linear,) if isinstance(linear, str) else linear.values()
        for choice in choices:
            if choice in TRAINED:
                raise ValueError(
                    f"TrineConfig: {choice!r} needs training or data; use trine.quantize, whose "
                    "results save_pretrained keeps, too"
                )
        self.modules_to_not_convert = modules_to_not_convert and list(modules_to_not_convert)
        self.layers = layers and {name: dict(entry) for name, entry in layers.items()}

    def with_layers(self, layers: Mapping[str, Mapping[str, Any]]) -> TrineConfig:
        """The same choices, and what became of the layers."""
        return TrineConfig(
            self.linear, self.modules_to_not_convert, layers, embedding=self.embedding
        )


def layers_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What `TrineConfig.layers` says of a model with packed layers."""
    return {
        name: {"kind": layer.kind, **_options(layer)}
        for name, layer in model.named_modules()
        if isinstance(layer, PackedLayer)
    }


def _options(layer: PackedLayer) -> dict[str, Any]:
    of_the_model = {*float_layer(layer)[1], "dtype"}
    return {key: value for key, value in layer.config().items() if key not in of_the_model}


def empty_layer(layer: nn.Module, entry: Mapping[str, Any]) -> PackedLayer:
    """The packed layer of `entry` in the shape of a float one, without values."""
    options = {key: value for key, value in entry.items() if key != "kind"} | float_layer(layer)[1]
    return layer_kinds[entry["kind"]](**options, device="meta", dtype=layer.weight.dtype)


def describe_packed_layers(model: nn.Module) -> None:
    """Give every model of transformers inside `model` the configuration of its packed layers.

    Its save_pretrained then writes what from_pretrained reads. Where one holds another with the
    same configuration the names are those of the outer one, which reading the inner one allows for.
    """
    described: set[int] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and id(module.config) not in described:
            described.add(id(module.config))
            declare_ties(module)
            stored, layers = getattr(module.config, "quantization_config", None), layers_of(module)
            if isinstance(stored, TrineConfig) and layers:
                module.config.quantization_config = stored.with_layers(layers)
            elif stored is None and layers:
                module.config.quantization_config = TrineConfig("float", layers=layers)
