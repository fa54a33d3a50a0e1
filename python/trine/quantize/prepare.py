"""From a float model to one that trains under quantisation."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch import nn

from trine.quantize.qat import QatLinear

if TYPE_CHECKING:
    from trine.compress.recipe import Recipe


def prepare_qat(model: nn.Module, recipe: Recipe, *, pruned_decay: float = 0.0) -> nn.Module:
    """A copy of `model` whose linear layers anticipate being packed as `recipe` says.

    The chosen nn.Linear layers become `QatLinear` layers with the same parameters under the same
    names. Train the copy as usual, then call `trine.convert`. Layers that cannot be replaced (their
    weight is shared, computed, or read by another module) and transformers' Conv1D stay float; the
    copy's attribute `qat_skipped` names them with the reason.

    Args:
        model: any module; it is not touched.
        recipe: its `linear` chooses for each layer by name; `prefer` has no meaning here.
        pruned_decay: of the layers that become 2:4, see `QatLinear`; `trine.prune.sr_ste` uses it.

    Raises:
        ValueError: no layer is left to train under quantisation, or the model cannot be copied.
    """
    # Imported here because trine.compress builds on this package.
    from trine.compress.layers import (
        close_fast_paths,
        copy_model,
        linear_layers,
        obstacles,
        require_module,
    )
    from trine.compress.recipe import Recipe

    require_module(model, "prepare_qat")
    if not isinstance(recipe, Recipe):
        raise ValueError(f"prepare_qat takes a trine.Recipe; got {type(recipe).__name__}")
    replacements: dict[nn.Module, nn.Module] = {}
    skipped: dict[str, str] = {}
    blocked = obstacles(model)
    for name, layer in linear_layers(model).items():
        choice = recipe.choice(name)
        if choice == "float":
            continue
        if name in blocked:
            skipped[name] = blocked[name]
        elif not isinstance(layer, nn.Linear):
            skipped[name] = f"{type(layer).__name__} has no form for training under quantisation"
        else:
            decay = pruned_decay if "24" in choice else 0.0
            replacements[layer] = _qat_linear(layer, choice, decay)
    if not replacements:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            "prepare_qat: the recipe and the model leave no nn.Linear to train under quantisation"
            + (f" ({reasons})" if reasons else "")
        )
    prepared = copy_model(model, replacements)
    close_fast_paths(prepared, QatLinear)
    prepared.qat_skipped = skipped
    return prepared


def _qat_linear(linear: nn.Linear, choice: str, pruned_decay: float) -> QatLinear:
    layer = QatLinear(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        device="meta",
        choice=choice,
        pruned_decay=pruned_decay,
    )
    layer.weight = copy.deepcopy(linear.weight)
    layer.bias = copy.deepcopy(linear.bias)
    return layer.train(linear.training)
