"""The layers that a recipe may change: which there are, what each is to become, what stays."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from trine.compress.layers import linear_layers, obstacles_of, signature
from trine.compress.recipe import Recipe
from trine.compress.ties import tables_of
from trine.nn.int8_conv import padding_in_pixels
from trine.quantize.groups import misfit


@dataclass(frozen=True)
class Candidates:
    """By name, in the order of the model: linear layers, and convolutions and embeddings where the
    recipe says anything of them.

    layers: all of them. choices: what the recipe says for each. kept: why some stay as they are.
    units: those that remain, each with the layers that are to be packed together with it (because
    an embedding's table is their weight), or alone.
    """

    layers: dict[str, nn.Module]
    choices: dict[str, str]
    kept: dict[str, str]
    units: list[tuple[str, ...]]


def candidates_of(model: nn.Module, recipe: Recipe) -> Candidates:
    """The layers of `model` under `recipe`."""
    linear = linear_layers(model)
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    embeddings = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    choices = {name: recipe.choice(name) for name in linear}
    if recipe.conv != "float":
        choices |= {name: recipe.conv_choice(name) for name in convolutions}
    if recipe.embedding != "float":
        choices |= {name: recipe.embedding_choice(name) for name in embeddings}
    layers = {name: module for name, module in model.named_modules() if name in choices}

    tables = tables_of(model, recipe)
    unfit = {name: misfit(choices[name], signature(layer)[0]) for name, layer in linear.items()}
    kept = {name: reason for name, reason in unfit.items() if reason}
    kept |= obstacles_of(model, {n: m for n, m in layers.items() if n not in embeddings})
    kept = {name: reason for name, reason in kept.items() if name not in tables.followers}
    for name in choices.keys() & convolutions.keys() - kept.keys():
        try:
            padding_in_pixels(convolutions[name])
        except ValueError as error:
            kept[name] = str(error)
    kept |= tables.left_alone
    kept |= {n: "the recipe leaves it float" for n, choice in choices.items() if choice == "float"}
    units = [
        tables.together.get(name, (name,))
        for name in layers
        if name not in kept and name not in tables.followers
    ]
    return Candidates(layers, choices, kept, units)
