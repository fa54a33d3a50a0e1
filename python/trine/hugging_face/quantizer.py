"""How from_pretrained makes trine's layers: of float weights, or out of a checkpoint of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from trine.compress.layers import float_layer, linear_layers, obstacles
from trine.compress.recipe import Recipe
from trine.compress.ties import share_tables, tables_of
from trine.hugging_face.config import METHOD, TrineConfig, empty_layer, layers_of
from trine.hugging_face.loaded import check_loaded
from trine.hugging_face.ties import Ties, declare_ties, hide_ties, restore_ties
from trine.nn import Int8Embedding, pack_linear

logger = logging.get_logger(__name__)


@register_quantizer(METHOD)
class TrineQuantizer(HfQuantizer):
    """Float models are loaded as they are and packed layer by layer; packed ones read in place."""

    quantization_config: TrineConfig
    _ties: Ties

    is_trainable = False
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    # ---- a checkpoint of packed layers ----

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        if not self.quantization_config.layers:
            raise ValueError(
                "the checkpoint's quantization_config names no layers; it was not written by "
                "save_pretrained of a model that trine had quantised"
            )
        for name, entry in _layers_here(model, self.quantization_config.layers).items():
            model.set_submodule(name, empty_layer(model.get_submodule(name), entry))
        self._ties = hide_ties(model)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype) -> torch.dtype | None:
        """Keeps the codes' and scales' dtypes; one that was cast is an error, not cast back."""
        stored = str(param.get_dtype()) if hasattr(param, "get_dtype") else None
        target = converter.target_patterns[0]
        is_scale = dtype == torch.float32 and target.endswith("scale")
        if is_scale and stored in ("BF16", "F16"):
            raise ValueError(
                f"{target} is {stored} in the checkpoint, expected F32; it was cast after packing"
            )
        return super().get_new_dtype(converter, param, dtype)

    # ---- both ----

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.pre_quantized:
            restore_ties(model, self._ties)
            check_loaded(model)
        else:
            self._pack(model)
        self.quantization_config = self.quantization_config.with_layers(layers_of(model))
        model.config.quantization_config = self.quantization_config

    # ---- a float checkpoint ----

    def _pack(self, model: PreTrainedModel) -> None:
        if len(set(getattr(model, "hf_device_map", {"": None}).values())) > 1:
            raise ValueError(
                "a model that is spread over several devices cannot be quantised while it is "
                'loaded; load it with device_map="cpu", save it, and spread it on loading that'
            )
        stored = self.quantization_config
        recipe = Recipe(stored.linear, embedding=stored.embedding)
        tables = tables_of(model, recipe)
        skipped = self.get_modules_to_not_convert(
            model, stored.modules_to_not_convert, model._keep_in_fp32_modules
        )
        reasons = obstacles(model)
        chosen = [
            name
            for name in linear_layers(model)
            if recipe.choice(name) != "float"
            and should_convert_module(name, skipped)
            and name not in tables.followers
        ]
        reasons |= tables.left_alone
        for name in (*chosen, *tables.left_alone):
            if name in reasons:
                logger.warning(f"trine: layer {name} stays float: {reasons[name]}")
        packable = [name for name in chosen if name not in reasons]
        packable += [name for names in tables.together.values() for name in names]
        if not packable:
            raise ValueError(
                "TrineConfig: no layer of the model is to be quantised; the model's linear layers "
                f"are {', '.join(linear_layers(model)) or 'none'}"
            )
        packed = {}
        for name in packable:
            layer = model.get_submodule(name)
            try:
                if isinstance(layer, torch.nn.Embedding):
                    packed[layer] = Int8Embedding.from_embedding(layer)
                else:
                    packed[layer] = pack_linear(layer, recipe.choice(name))
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
        share_tables(packed)
        for layer, name in zip(packed, packable, strict=True):
            model.set_submodule(name, packed[layer])
        declare_ties(model)


def _layers_here(
    model: PreTrainedModel, stored: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """The checkpoint's layers by their names in a model that may have a head more, less or another.

    Raises ValueError where a layer of the body is none of the model's linear ones.
    """
    prefix = f"{model.base_model_prefix}."
    stored_with_head = any(name.startswith(prefix) for name in stored)
    has_head = hasattr(model, model.base_model_prefix)
    layers = {name for name, module in model.named_modules() if float_layer(module)}
    here = {}
    for stored_name, entry in stored.items():
        in_body = stored_name.startswith(prefix) or not stored_with_head
        name = stored_name
        if in_body:
            name = prefix * has_head + stored_name.removeprefix(prefix)
        if name in layers:
            here[name] = entry
        elif in_body:
            raise ValueError(
                f"the checkpoint has a packed layer {stored_name!r}, but {type(model).__name__} "
                "has no layer of that name and kind"
            )
    return here
