"""The end of pruning to 2:4: layers that are stored and run as such."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from trine.nn import Sparse24Linear
from trine.prune.layers import by_row, check_finite, prunable_layers
from trine.quantize.weights import two_of_four

__all__ = ["as_sparse24", "sr_ste"]


def sr_ste(
    model: nn.Module,
    layers: str | Iterable[str] = "*",
    *,
    skip: str | Iterable[str] = (),
    decay: float = 2e-4,
    values: str = "float",
) -> nn.Module:
    """A copy of `model` to be trained from dense to 2:4 by SR-STE (Zhou et al. 2021,
    arXiv:2102.04010).

    In every forward pass each layer uses the two largest of every four weights. The gradient of
    those goes to all four, straight through, and a weight w that is not used gains decay * w, so
    that it shrinks and the choice comes to rest: W <- W - rate * (grad + decay * (1 - mask) * W).

    Train the copy in any loop, with distillation or without; then `trine.convert` gives
    `Sparse24Linear` layers, of the same bits as the copy has in evaluation mode. The decay comes
    with each backward pass: with gradients accumulated over n, give decay / n; a gradient scaler
    divides it by its scale.

    Args:
        model: any module; it is not touched. Of transformers' Conv1D there is no such form.
        layers, skip: patterns of names, see `prunable_layers`; nn.Linear alone.
        decay: lambda_w of the paper, which uses 2e-4 with SGD.
        values: "float", or "int8" for quantised values and activations as well.

    Raises:
        ValueError: a chosen layer cannot be trained so, a decay that is not above 0, NaN weights.
    """
    from trine.compress.layers import obstacles
    from trine.compress.recipe import Recipe
    from trine.quantize import prepare_qat

    if not decay > 0:
        raise ValueError(f"sr_ste: decay is {decay}; it must be above 0")
    if values not in ("float", "int8"):
        raise ValueError(f"sr_ste: values is {values!r}; it must be 'float' or 'int8'")
    chosen = prunable_layers(model, layers, skip)
    blocked = obstacles(model)
    for name, layer in chosen.items():
        if reason := blocked.get(name):
            raise ValueError(f"sr_ste: layer '{name}' must stay as it is: {reason}")
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"sr_ste: layer '{name}' is a {type(layer).__name__}, it must be nn.Linear; leave "
                f"it out with skip='{name}'"
            )
        check_finite(name, layer)
    choice = "sparse24" if values == "float" else "sparse24-int8"
    return prepare_qat(
        model, Recipe(linear={name or "*": choice for name in chosen}), pruned_decay=decay
    )


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
    from trine.compress.layers import obstacles
    from trine.compress.packed_copy import packed_copy

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
    return packed_copy(model, replacements).eval()
