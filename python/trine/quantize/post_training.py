"""Quantising a model that was trained in float, with data to look at and without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trine.quantize.fold import fold_batch_norm, norms_to_fold
from trine.quantize.groups import misfit, split_group
from trine.quantize.observers import MinMax, Observer, grid
from trine.quantize.rounding import GRIDS, gptq, nearest
from trine.quantize.weights import dense

if TYPE_CHECKING:
    from trine.compress.recipe import Recipe

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
    """A copy of `model` with packed layers, quantised by what calibration data shows.

        small = post_training(model, Recipe("int8"), loader, rounding="gptq", batches=32)

    Every layer that the recipe chooses is packed, also where that is not faster: `trine.compress`
    is for that, and needs no data but shapes. Batch norms are folded first, where they can be (see
    `fold_batch_norm`).

    Args:
        model: any module; it is not touched.
        recipe: its `linear` chooses for each layer: "int8" (activations with a scale for each row,
            found at run time), "int8-static" (one scale and zero point, of the range that
            `observer` finds here), "int8-weight" (activations stay floats), "ternary" or
            "ternary-twn" (these three also with a group size, as in "ternary-g128"); "float" leaves
            a layer alone. Its `conv` chooses for each nn.Conv2d:
            "int8" (a scale for each image) or "int8-static". Its `embedding` chooses "int8" for an
            nn.Embedding; the table is rounded to the nearest whatever `rounding` says, also where
            it is the weight of linear layers, which go on sharing it.
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
        ValueError: no layer to quantise, another choice or rounding, a group size that does not
            divide a layer's input features, a weight that holds NaN, or as `trine.calibrate` does.
    """
    # Imported here because these build on this package.
    from trine.calibration import Several, calibrate, in_turn
    from trine.calibration.statistics import ColumnMean, SecondMoment
    from trine.compress.edits import record
    from trine.compress.layers import copy_model
    from trine.compress.packed_copy import packed_copy

    if rounding not in ROUNDINGS:
        raise ValueError(f"post_training: rounding is {rounding!r}; it must be one of {ROUNDINGS}")
    chosen, tables, skipped = _chosen_layers(model, recipe)
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        if isinstance(data, Iterator):
            data = list(islice(data, batches))  # it is read twice
        pairs = norms_to_fold(model, data, None)
        if pairs := {name: norm for name, norm in pairs.items() if name in chosen}:
            model = fold_batch_norm(model, batch_norms=pairs)
    work = copy_model(model, {}).eval()
    layers = {name: work.get_submodule(name) for name in chosen}
    of_tables = {name: work.get_submodule(name) for name in tables}
    for name, layer in (of_tables | layers).items():
        if not layer.weight.isfinite().all():
            raise ValueError(
                f"post_training: the weight of layer {name!r} holds NaN or infinity; it cannot be "
                "quantised"
            )

    def statistics() -> Several:
        wanted: dict[str, Any] = {}
        if "int8-static" in chosen.values():
            wanted["observer"] = observer()
        if rounding == "gptq":
            wanted["moment"] = SecondMoment()
        if correct_bias:
            wanted["mean"] = ColumnMean()
        return Several(**wanted)

    packed: dict[nn.Module, nn.Module] = _packed_tables(of_tables.values())
    how = {"layers": layers, "batches": batches, "progress": progress}
    if not layers:
        turns = ()
    elif rounding == "gptq" or correct_bias:
        turns = in_turn(work, data, statistics, **how)
    else:
        seen = calibrate(work, data, statistics, **how)
        turns = ((name, layers[name], seen[name]) for name in layers)

    for name, layer, found in turns:
        codes, scale = _round(chosen[name], layer, rounding, found, damping)
        if correct_bias:
            _correct_bias(layer, codes, scale, found.mean.mean)
        static: dict[str, Tensor] = {}
        if chosen[name] == "int8-static":
            ends = grid(*found.observer.range(), symmetric=symmetric)
            static = dict(zip(("input_scale", "input_zero_point"), ends, strict=True))
        packed[layer] = _packed(chosen[name], layer, codes, scale, static)
        with torch.no_grad():  # what the layers after it see
            layer.weight.copy_(_dense(layer, codes, scale))
    small = packed_copy(work, packed)
    record(model, small)
    small.skipped = skipped
    return small


def _chosen_layers(
    model: nn.Module, recipe: Recipe
) -> tuple[dict[str, str], list[str], dict[str, str]]:
    """The choice for each layer that is to be quantised by what data shows, the embeddings and what
    shares their tables, and why others are not quantised."""
    from trine.compress.layers import linear_layers, obstacles_of, require_module, signature
    from trine.compress.recipe import Recipe
    from trine.compress.ties import tables_of
    from trine.nn.int8_conv import padding_in_pixels

    require_module(model, "post_training")
    if not isinstance(recipe, Recipe):
        raise ValueError(f"post_training takes a trine.Recipe; got {type(recipe).__name__}")
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    linear = linear_layers(model)
    choices = {name: recipe.choice(name) for name in linear}
    choices |= {name: recipe.conv_choice(name) for name in convolutions}
    tables = tables_of(model, recipe)
    chosen: dict[str, str] = {}
    skipped: dict[str, str] = dict(tables.left_alone)
    blocked = obstacles_of(model, linear | convolutions)
    for name, choice in choices.items():
        if choice == "float" or name in tables.followers:
            continue
        if split_group(choice)[0] not in GRIDS:
            raise ValueError(
                f"post_training: layer {name!r} is to be {choice!r}; it must be one of "
                f"{', '.join(GRIDS)} or 'float' (trine.prune and trine.compress make 2:4 layers)"
            )
        if name in linear and (reason := misfit(choice, signature(linear[name])[0])):
            raise ValueError(f"post_training: layer {name!r} is to be {choice!r}, but {reason}")
        try:
            if name in blocked:
                raise ValueError(blocked[name])
            if name in convolutions:
                padding_in_pixels(convolutions[name])
            chosen[name] = choice
        except ValueError as reason:
            skipped[name] = str(reason)
    if not chosen and not tables.together:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            "post_training: the recipe and the model leave no linear layer, convolution or "
            "embedding to quantise" + (f" ({reasons})" if reasons else "")
        )
    return chosen, [name for names in tables.together.values() for name in names], skipped


def _packed_tables(layers: Iterable[nn.Module]) -> dict[nn.Module, nn.Module]:
    """Embeddings, and linear layers of the same tables, as they are packed; they themselves get
    the values that the packed ones stand for, for the layers after them to see."""
    from trine.compress.ties import share_tables
    from trine.nn import Int8Embedding, Int8Linear

    packed = {
        layer: Int8Embedding.from_embedding(layer)
        if isinstance(layer, nn.Embedding)
        else Int8Linear.from_linear(layer)
        for layer in layers
    }
    share_tables(packed)
    with torch.no_grad():
        for layer, made in packed.items():
            layer.weight.copy_(made.dense_weight())
    return packed


def _round(
    choice: str, layer: nn.Module, rounding: str, found: Any, damping: float
) -> tuple[Tensor, Tensor]:
    """Codes int8 and scale of a layer, as rows: [N, K] and [N], [1] or [N, groups]."""
    from trine.calibration import weight_matrix

    weight = weight_matrix(layer)
    if rounding == "nearest":
        return nearest(choice, weight.flatten(0, -2))
    if weight.dim() == 2:
        return gptq(choice, weight, found.moment.gram, damping=damping)
    # A convolution of several groups: each is a product of its own.
    parts = [
        gptq(choice, of_group, gram, damping=damping)
        for of_group, gram in zip(weight, found.moment.gram, strict=True)
    ]
    codes, scales = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(scales)


def _dense(layer: nn.Module, codes: Tensor, scale: Tensor) -> Tensor:
    """What the codes stand for, in the shape and dtype of the layer's weight."""
    from trine.calibration import from_matrix

    return from_matrix(layer, dense(codes, scale).to(layer.weight.dtype))


def _correct_bias(layer: nn.Module, codes: Tensor, scale: Tensor, mean: Tensor) -> None:
    """Add what rounding takes from the mean output to the bias, which a layer without one gets."""
    from trine.calibration import weight_matrix

    weight = weight_matrix(layer)
    rounded = dense(codes, scale).reshape(weight.shape)
    lost = ((weight.double() - rounded.double()) @ mean[..., None]).flatten()
    bias = lost if layer.bias is None else layer.bias.detach().double() + lost
    layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)


def _packed(
    choice: str, layer: nn.Module, codes: Tensor, scale: Tensor, static: dict[str, Tensor]
) -> nn.Module:
    from trine.nn import Int8Conv2d, Int8Linear, Int8WeightLinear, TernaryLinear

    bias, dtype = layer.bias, layer.weight.dtype
    if isinstance(layer, nn.Conv2d):
        return Int8Conv2d.from_codes(layer, codes.reshape(layer.weight.shape), scale, **static)
    if split_group(choice)[0] == "int8-weight":
        return Int8WeightLinear.from_codes(codes, scale, bias, dtype=dtype)
    if choice.startswith("int8"):
        return Int8Linear.from_codes(codes, scale, bias, dtype=dtype, **static)
    return TernaryLinear.from_codes(codes, scale, bias, dtype=dtype)
