"""Embeddings whose table is the weight of other layers too: all of them are packed, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from trine.compress.layers import obstacles_of
from trine.compress.recipe import Recipe
from trine.nn import Int8Embedding, Int8Linear
from trine.nn.int8_embedding import refuse_max_norm
from trine.nn.packed import is_conv1d


@dataclass(frozen=True)
class Tables:
    """The embeddings of a model, as a recipe wants them.

    together: for each embedding that is to become int8 its own name and those of the layers that
        share its table. left_alone: why others stay as they are, also of those tied to them.
    """

    together: dict[str, tuple[str, ...]]
    left_alone: dict[str, str]

    @property
    def followers(self) -> set[str]:
        """The layers that share the table of another."""
        return {name for names in self.together.values() for name in names[1:]}


def tables_of(model: nn.Module, recipe: Recipe) -> Tables:
    """What becomes of the embeddings that `recipe` chooses, and of what is tied to them."""
    modules = dict(model.named_modules())
    together: dict[str, tuple[str, ...]] = {}
    left_alone: dict[str, str] = {}
    done: set[int] = set()
    for name, layer in modules.items():
        if not isinstance(layer, nn.Embedding) or recipe.embedding_choice(name) == "float":
            continue
        weight = layer._parameters.get("weight")
        if id(weight) in done:
            continue
        done.add(id(weight))
        tied = [
            other
            for other, module in modules.items()
            if other != name and module._parameters.get("weight") is weight is not None
        ]
        names = (name, *tied)
        reason = _obstacle(model, {other: modules[other] for other in names}, recipe)
        if reason is None:
            together[name] = names
        else:
            left_alone |= dict.fromkeys(
                (n for n in names if isinstance(modules[n], nn.Embedding)), reason
            )
    return Tables(together, left_alone)


def _obstacle(model: nn.Module, layers: Mapping[str, nn.Module], recipe: Recipe) -> str | None:
    """Why these layers, which share a table, must stay as they are."""
    blocked = obstacles_of(model, layers, together=True)
    for name, layer in layers.items():
        if name in blocked:
            return blocked[name]
        if isinstance(layer, nn.Embedding):
            if recipe.embedding_choice(name) == "float":
                return f"its table is that of {name!r}, too, which the recipe leaves float"
            try:
                refuse_max_norm(layer)
            except ValueError as error:
                return str(error)
        elif not isinstance(layer, nn.Linear) or is_conv1d(layer):
            return f"its table is the weight of {name!r}, a {type(layer).__name__}"
        elif recipe.choice(name) != "int8":
            return (
                f"its table is the weight of {name!r}, too, for which the recipe says "
                f"{recipe.choice(name)!r}, not 'int8'"
            )
    return None


def share_tables(packed: Mapping[nn.Module, nn.Module]) -> None:
    """Have packed layers hold the same tensors where the layers that they replace shared a weight.

    Their codes and scales are equal then, for rows of embeddings and of linear layers are quantised
    by one rule; where they are not, because a layer has learned its scales, they stay apart.
    """
    first: dict[nn.Parameter, nn.Module] = {}
    for layer, made in packed.items():
        if isinstance(made, Int8Embedding | Int8Linear):
            owner = first.setdefault(layer.weight, made)
            names = ("packed_weight", "weight_scale")
            if all(torch.equal(getattr(made, name), getattr(owner, name)) for name in names):
                made.packed_weight, made.weight_scale = owner.packed_weight, owner.weight_scale
