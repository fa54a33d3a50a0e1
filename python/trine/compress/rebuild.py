"""A model's float structure as plain data, and the model built from it without running its code.

Two kinds of model can be described: trees of common torch.nn modules, and models of transformers
with their configuration. What was changed in the structure since (pruned, factorised, shared) is
described by `edits`. Building looks classes up in fixed places and hands them plain values.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import nn

from trine.compress.edits import apply, difference
from trine.compress.trees import Description, build_tree, describe_tree, refuse_explosion

# Attention of transformers' own; any other name could make it fetch and run a kernel's code.
_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
_FETCHING = ("auto_map", "kernel_config", "quantization_config", "use_pretrained_backbone")


def describe(model: nn.Module) -> Description | None:
    """The description of `model`, with float layers for packed ones; None where it has none.

    Only what building it gives the very same structure for has one.
    """
    description = _describe_transformers(model) or describe_tree(model, {}, "")
    if description is None:
        return None
    try:
        twin = build(description, device="meta")  # takes neither memory nor random numbers
    except ValueError:
        return None  # it reads values while it is built, which the meta device does not have
    edits = difference(twin, model)
    if edits is None:
        return None
    return {**description, "edits": edits} if edits else description


def build(description: Description, device: str = "cpu") -> nn.Module:
    """The model described, with weights of no meaning; the caller's random state stays as it is.

    Raises ValueError for what `describe` would not have written.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            if "transformers" in description:
                model = _build_transformers(description)
            else:
                model = build_tree(description, {}, "")
            refuse_explosion(model)
            apply(model, description.get("edits", []))
            return model
    except ValueError:
        raise
    except Exception as error:  # a constructor may raise anything for values not made for it
        raise ValueError(f"the description of the model is malformed ({error!r})") from error


# ---- models of transformers ----


def _describe_transformers(model: nn.Module) -> Description | None:
    # A model of the library has imported it; asking here spares everyone else the import.
    library = sys.modules.get("transformers")
    name = type(model).__name__
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None
    if getattr(library, name, None) is not type(model):
        return None
    attention = model.config._attn_implementation
    description = {"transformers": name, "config": _plain(model.config), "attention": attention}
    if attention is not None and attention not in _ATTENTION:
        return None
    if model.can_generate():
        description["generation"] = _plain(model.generation_config)
    return description


def _plain(config: Any) -> Any:
    return _harmless(json.loads(config.to_json_string(use_diff=False)))


def _harmless(config: Any) -> Any:
    """Without the keys that name private state, or code and weights to be fetched."""
    if isinstance(config, dict):
        return {
            key: _harmless(value)
            for key, value in config.items()
            if not key.startswith("_") and "implementation" not in key and key not in _FETCHING
        }
    return [_harmless(item) for item in config] if isinstance(config, list) else config


def _build_transformers(description: Description) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "the checkpoint holds a model of transformers; pip install transformers"
        ) from error
    model_class = getattr(transformers, description["transformers"], None)
    if not isinstance(model_class, type) or not issubclass(
        model_class, transformers.PreTrainedModel
    ):
        raise ValueError(f"transformers has no model class {description['transformers']!r}")
    config = model_class.config_class.from_dict(_harmless(description["config"]))
    if description["attention"] not in (None, *_ATTENTION):
        raise ValueError(f"unknown attention implementation {description['attention']!r}")
    config._attn_implementation = description["attention"]
    model = model_class(config)
    if "generation" in description:
        generation = _harmless(description["generation"])
        model.generation_config = transformers.GenerationConfig.from_dict(generation)
    return model
