"""Quantising a model that was trained in float, with data to look at and without training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trine.quantize.observers import MinMax, Observer, grid
from trine.quantize.rounding import GRIDS, gptq, nearest

if TYPE_CHECKING:
    from trine.compress.recipe import Recipe
    from trine.nn import PackedLinear

ROUNDINGS = ("nearest", "gptq")


def post_training(
    model: nn.Module,
    recipe: Recipe,
    data: Any,
    *,
    rounding: str = "nearest",
    observer: Callable[[], Observer] = MinMax,
    symmetric: bool = False,
    correct_bias: bool = False,
    damping: float = 0.01,
    batches: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> nn.Module:
    """A copy of `model` with packed linear layers, quantised by what calibration data shows.

        small = post_training(model, Recipe("int8"), loader, rounding="gptq", batches=32)

    Every layer that the recipe chooses is packed, also where that is not faster: `trine.compress`
    is for that, and needs no data but shapes.

    Args:
        model: any module; it is not touched.
        recipe: its `linear` chooses for each layer: "int8" (activations with a scale for each row,
            found at run time), "int8-static" (one scale and zero point, of the range that
            `observer` finds here), "ternary" or "ternary-twn"; "float" leaves a layer alone.
        data: batches to calibrate with, as for `trine.calibrate`.
        rounding: of the weights; "nearest", or "gptq" (see `trine.quantize.gptq`).
        observer: of "int8-static": makes an observer of `trine.quantize.observers` for each layer.
        symmetric: of "int8-static": whether the zero point is to be 0.
        correct_bias: add to each bias what rounding the weights took from the mean output,
            (W - W_q) E[x] (Nagel et al. 2019, arXiv:1906.04721); a layer without a bias gets one.
        damping: of "gptq".
        batches: how many batches are read at the most; all by default.
        progress: with "gptq" or `correct_bias`, where every layer takes a pass so that it sees what
            the quantised layers before it give: called with the number of layers that are done;
            else with the number of batches.

    Returns:
        The copy, in evaluation mode. Its attribute `skipped` says why layers that the recipe
        chooses were left alone (their weight is shared, computed, or read by another module).

    Raises:
        ValueError: no layer to quantise, another choice or rounding, a weight that holds NaN, or as
            `trine.calibrate` does.
    """
    # Imported here because these build on this package.
    from trine.calibration import Several, calibrate, from_matrix, in_turn, weight_matrix
    from trine.calibration.statistics import ColumnMean, SecondMoment
    from trine.compress.layers import copy_model
    from trine.compress.packed_copy import packed_copy
    from trine.nn.packed import dense_parts

    if rounding not in ROUNDINGS:
        raise ValueError(f"post_training: rounding is {rounding!r}; it must be one of {ROUNDINGS}")
    chosen, skipped = _chosen_layers(model, recipe)
    work = copy_model(model, {}).eval()
    layers = {name: work.get_submodule(name) for name in chosen}
    for name, layer in layers.items():
        try:
            dense_parts(layer)
        except ValueError as error:
            raise ValueError(f"post_training: layer {name!r}: {error}") from error

    def statistics() -> Several:
        wanted: dict[str, Any] = {}
        if "int8-static" in chosen.values():
            wanted["observer"] = observer()
        if rounding == "gptq":
            wanted["moment"] = SecondMoment()
        if correct_bias:
            wanted["mean"] = ColumnMean()
        return Several(**wanted)

    how = {"layers": layers, "batches": batches, "progress": progress}
    if rounding == "gptq" or correct_bias:
        turns = in_turn(work, data, statistics, **how)
    else:
        seen = calibrate(work, data, statistics, **how)
        turns = ((name, layers[name], seen[name]) for name in layers)

    packed: dict[nn.Module, nn.Module] = {}
    for name, layer, found in turns:
        choice, weight = chosen[name], weight_matrix(layer)
        codes, scale = (
            gptq(choice, weight, found.moment.gram, damping=damping)
            if rounding == "gptq"
            else nearest(choice, weight)
        )
        values = codes * scale.reshape(-1, 1)
        bias = layer.bias
        if correct_bias:
            lost = (weight.double() - values.double()) @ found.mean.mean
            bias = (lost if bias is None else bias.detach().double() + lost).to(weight.dtype)
        static = {}
        if choice == "int8-static":
            low, high = found.observer.range()
            static = dict(
                zip(
                    ("input_scale", "input_zero_point"),
                    grid(low, high, symmetric=symmetric),
                    strict=True,
                )
            )
        packed[layer] = _packed(choice, codes, scale, bias, weight.dtype, static)
        with torch.no_grad():  # what the layers after it see
            layer.weight.copy_(from_matrix(layer, values.to(weight.dtype)))
            if correct_bias:
                layer.bias = nn.Parameter(bias, requires_grad=False)
    small = packed_copy(work, packed)
    small.skipped = skipped
    return small


def _chosen_layers(model: nn.Module, recipe: Recipe) -> tuple[dict[str, str], dict[str, str]]:
    """The choice for each layer that is to be quantised, and why others are not."""
    from trine.compress.layers import linear_layers, obstacles, require_module
    from trine.compress.recipe import Recipe

    require_module(model, "post_training")
    if not isinstance(recipe, Recipe):
        raise ValueError(f"post_training takes a trine.Recipe; got {type(recipe).__name__}")
    chosen: dict[str, str] = {}
    skipped: dict[str, str] = {}
    blocked = obstacles(model)
    for name in linear_layers(model):
        choice = recipe.choice(name)
        if choice == "float":
            continue
        if choice not in GRIDS:
            raise ValueError(
                f"post_training: layer {name!r} is to be {choice!r}; it must be one of "
                f"{', '.join(GRIDS)} or 'float' (trine.prune and trine.compress make 2:4 layers)"
            )
        if name in blocked:
            skipped[name] = blocked[name]
        else:
            chosen[name] = choice
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            "post_training: the recipe and the model leave no linear layer to quantise"
            + (f" ({reasons})" if reasons else "")
        )
    return chosen, skipped


def _packed(
    choice: str,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    static: dict[str, Tensor],
) -> PackedLinear:
    from trine.nn import Int8Linear, TernaryLinear

    if choice.startswith("int8"):
        return Int8Linear.from_codes(codes, scale, bias, dtype=dtype, **static)
    return TernaryLinear.from_codes(codes, scale, bias, dtype=dtype)
