"""The end of pruning to 2:4: layers that are stored and run as such."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from trine.nn import Sparse24Linear
from trine.prune.layers import by_row, prunable_layers
from trine.quantize.weights import two_of_four

__all__ = ["as_sparse24"]


def as_sparse24(
    model: nn.Module,
    layers: str | Iterable[str] = "*",
    *,
    skip: str | Iterable[str] = (),
    values: str = "float",
) -> nn.Module:
    """A copy of `model`, in evaluation mode, whose layers of 2:4 weights are `Sparse24Linear`.

    Nothing is pruned here: each chosen layer must hold at most two non-zeros in every four columns,
    as `wanda`, `sparsegpt` or a mask left it. With values="float" the weights keep their bits.
    `trine.compress` does the same where it is measured to be faster.

    Args:
        model: any module; it is not touched.
        layers, skip: patterns of names, see `prunable_layers`; nn.Linear or Conv1D.
        values: "float", or "int8" for quantised values and activations.

    Raises:
        ValueError: a chosen layer is not 2:4 or no linear layer.
    """
    from trine.compress.layers import (
        close_fast_paths,
        copy_model,
        obstacles,
        refuse_save_pretrained,
    )

    chosen = prunable_layers(model, layers, skip)
    blocked = obstacles(model)
    replacements = {}
    for name, layer in chosen.items():
        if reason := blocked.get(name):
            raise ValueError(f"as_sparse24: layer '{name}' must stay as it is: {reason}")
        if layer.weight.dim() != 2:
            raise ValueError(
                f"as_sparse24: layer '{name}' is a {type(layer).__name__}; only linear layers have "
                f"a 2:4 form; leave it out with skip='{name}'"
            )
        weight = by_row(layer, layer.weight.detach())
        if (weight[~two_of_four(weight)] != 0).any():
            raise ValueError(
                f"as_sparse24: layer '{name}' has more than two non-zeros in some four columns; "
                f"prune it to 2:4 first, or leave it out with skip='{name}'"
            )
        replacements[layer] = Sparse24Linear.from_linear(layer, values=values)
    small = copy_model(model, replacements).eval()
    close_fast_paths(small)
    refuse_save_pretrained(small)
    return small
