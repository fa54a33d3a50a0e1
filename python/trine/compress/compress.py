"""Make a model smaller and faster: measure every linear layer, swap those where it pays."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from torch import nn

from trine.compress.layers import (
    bytes_of,
    linear_layers,
    obstacles,
    require_module,
    signature,
)
from trine.compress.measure import Measurements, Timer
from trine.compress.observe import Call, as_batches, observe
from trine.compress.packed_copy import packed_copy
from trine.compress.recipe import Recipe
from trine.compress.report import (
    CompressionReport,
    LayerReport,
    ShapeTiming,
    require_place_for_report,
)
from trine.evaluate.latency import alternate
from trine.nn import PackedLinear, pack_linear
from trine.quantize.groups import misfit
from trine.quantize.qat_layer import QatLayer

# On CPUs that path was measured to gain nothing but where it skips padding (nested tensors).
_NOT_MEASURED = "torch's fused encoder path, which this closes, was not measured"


def compress(
    model: nn.Module, recipe: Recipe, sample_inputs: Any, *, timer: Timer = alternate
) -> nn.Module:
    """A copy of `model`, in evaluation mode, with compressed linear layers where that pays.

    Runs a copy over the samples to see with which row counts and dtypes each layer is called,
    times each layer against its compressed form at those shapes, and swaps it only where the
    compressed one takes less time in total; with `prefer="size"` wherever it takes fewer bytes.
    Layers are nn.Linear and the Conv1D of transformers. `model` itself is not touched. The copy
    keeps names, hooks, dtypes, tied weights and whatever else was not swapped.

    Always left alone: a layer that the recipe leaves float, that no sample reached, whose weight
    or bias is shared with another module, whose input features the recipe's group size does not
    divide, that has parametrizations, a forward or further tensors of its own, that
    nn.MultiheadAttention reads directly, or whose weight is neither float32, bfloat16 nor float16.

    Args:
        model: any module that holds linear layers.
        recipe: which layer gets which kind.
        sample_inputs: what the model is typically called with, since its shapes decide: a tensor
            (the only argument), a tuple (positional arguments), a mapping (keyword arguments, as
            tokenizers give), or a list of such batches.
        timer: takes calls by name, returns seconds per call by name.

    Returns:
        The copy. Its attribute `report`, a `CompressionReport`, says for each layer whether it was
        swapped, the measured ratio and the reason; print it for a table.

    Raises:
        ValueError: the model has no linear layer, already has an attribute `report` (but for that
            of an earlier stage, such as `trine.factorize`), holds QatLinear layers
            (`trine.convert` packs those), is the result of torch.compile, or
            cannot be copied; a weight that is to be compressed holds NaN or infinity; `recipe` or
            `sample_inputs` of another form. What the model raises on the samples comes through.
    """
    _check(model, recipe)
    batches = as_batches(sample_inputs)
    layers = linear_layers(model)
    kept = _left_alone(model, recipe)
    candidates = {name: layer for name, layer in layers.items() if name not in kept}
    _check_finite(candidates)
    calls = observe(model, candidates, batches)

    measurements = Measurements(timer)
    fused = _inside_fused_encoders(model)
    rows: list[LayerReport] = []
    replacements: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        choice = recipe.choice(name)
        if name in kept:
            rows.append(_kept(name, layer, choice, kept[name]))
        elif not calls[name]:
            rows.append(_kept(name, layer, choice, "no sample reached it"))
        else:
            packed = pack_linear(layer, choice)
            timings = _time(layer, packed, choice, calls[name], measurements)
            row = _decide(name, layer, packed, choice, timings, recipe.prefer)
            if row.swapped:
                replacements[layer] = packed
                if layer in fused:
                    row = replace(row, reason=f"{row.reason}; {_NOT_MEASURED}")
            rows.append(row)

    small = packed_copy(model, replacements).eval()
    small.report = CompressionReport(recipe, tuple(rows), bytes_of(model), bytes_of(small))
    return small


def _check(model: nn.Module, recipe: Recipe) -> None:
    require_module(model, "compress")
    if not isinstance(recipe, Recipe):
        raise ValueError(f"compress takes a trine.Recipe; got {type(recipe).__name__}")
    require_place_for_report(model, "compress")
    if hasattr(model, "_orig_mod"):
        raise ValueError("compress the model first and call torch.compile on the result")
    if recipe.conv != "float":
        raise ValueError(
            "compress measures linear layers and leaves convolutions alone; for recipe.conv take "
            "trine.quantize.post_training or prepare_qat"
        )
    if any(isinstance(module, QatLayer) for module in model.modules()):
        raise ValueError("the model was trained under quantisation; trine.convert packs it")
    if not linear_layers(model):
        raise ValueError("compress: the model holds no linear layer (nn.Linear or Conv1D)")


def _left_alone(model: nn.Module, recipe: Recipe) -> dict[str, str]:
    """The layers that are not even measured, by name, each with the reason."""
    layers = linear_layers(model)
    asked = {
        name: "the recipe leaves it float" for name in layers if recipe.choice(name) == "float"
    }
    unfit = {name: misfit(recipe.choice(name), signature(m)[0]) for name, m in layers.items()}
    misfits = {name: reason for name, reason in unfit.items() if reason}
    return misfits | obstacles(model) | asked


def _inside_fused_encoders(model: nn.Module) -> set[nn.Module]:
    return {
        module
        for encoder in model.modules()
        if isinstance(encoder, nn.TransformerEncoderLayer)
        for module in encoder.modules()
    }


def _check_finite(layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        if layer.weight.is_meta:
            raise ValueError(f"compress: layer {name!r} is on the meta device; load it first")
        if not layer.weight.detach().isfinite().all():
            raise ValueError(
                f"compress: the weight of layer {name!r} holds NaN or infinity; repair it, or "
                'leave it out with a recipe that says "float" for it'
            )


def _time(
    layer: nn.Module,
    packed: PackedLinear,
    choice: str,
    calls: Counter[Call],
    measurements: Measurements,
) -> tuple[ShapeTiming, ...]:
    return tuple(
        ShapeTiming(
            call.rows,
            str(call.autocast or call.dtype).removeprefix("torch."),
            count,
            *measurements.seconds(layer, packed, choice, call),
        )
        for call, count in calls.items()
    )


def _decide(
    name: str,
    layer: nn.Module,
    packed: PackedLinear,
    choice: str,
    timings: tuple[ShapeTiming, ...],
    prefer: str,
) -> LayerReport:
    before, after = bytes_of(layer), bytes_of(packed)
    trial = LayerReport(name, choice, True, "", before, after, timings)
    speed = f"{trial.ratio:.2f} times as fast as float"
    if prefer == "size":
        swapped = after < before
        reason = f"{'smaller' if swapped else 'not smaller'}; measured {speed}"
    else:
        swapped = trial.compressed_seconds < trial.float_seconds
        reason = f"measured {speed}"
    return LayerReport(name, choice, swapped, reason, before, after if swapped else before, timings)


def _kept(name: str, layer: nn.Module, choice: str, reason: str) -> LayerReport:
    size = bytes_of(layer)
    return LayerReport(name, choice, False, reason, size, size)
