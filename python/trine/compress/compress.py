"""Make a model smaller and faster: measure every layer, swap those where it pays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from trine.compress.candidates import Candidates, candidates_of
from trine.compress.layers import bytes_of, require_module
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
from trine.compress.ties import share_tables
from trine.evaluate.latency import alternate
from trine.nn import Int8Conv2d, Int8Embedding, pack_linear
from trine.quantize.qat_layer import QatLayer

# On CPUs that path was measured to gain nothing but where it skips padding (nested tensors).
_NOT_MEASURED = "torch's fused encoder path, which this closes, was not measured"

# An embedding takes next to nothing of a model's time and a good part of its size: what is not
# slower is worth it. Two timings of one call differ by about this much.
_NOT_SLOWER = 1.05


def compress(
    model: nn.Module, recipe: Recipe, sample_inputs: Any, *, timer: Timer = alternate
) -> nn.Module:
    """A copy of `model`, in evaluation mode, with compressed layers where that pays.

    Runs a copy over the samples to see with which row counts and dtypes each layer is called,
    times each layer against its compressed form at those shapes, and swaps it only where the
    compressed one takes less time in total; with `prefer="size"` wherever it takes fewer bytes.
    Layers are nn.Linear and the Conv1D of transformers, and, where the recipe speaks of them,
    nn.Conv2d and nn.Embedding (swapped where it is not slower; where its table is the weight of
    linear layers, too, all are swapped at once and share one packed table). `model` itself is not
    touched. The copy keeps names, hooks, dtypes, tied weights and whatever else was not swapped.

    Always left alone: a layer that the recipe leaves float, that no sample reached, whose weight
    or bias is shared with another module (but for such a table), whose input features the recipe's
    group size does not divide, that has parametrizations, a forward or further tensors of its own,
    that nn.MultiheadAttention reads directly, or whose weight is neither float32, bfloat16 nor
    float16.

    Args:
        model: any module that holds such layers.
        recipe: which layer gets which kind.
        sample_inputs: what the model is typically called with, since its shapes decide: a tensor
            (the only argument), a tuple (positional arguments), a mapping (keyword arguments, as
            tokenizers give), or a list of such batches.
        timer: takes calls by name, returns seconds per call by name.

    Returns:
        The copy. Its attribute `report`, a `CompressionReport`, says for each layer whether it was
        swapped, the measured ratio and the reason; print it for a table.

    Raises:
        ValueError: the model has no such layer, already has an attribute `report` (but for that
            of an earlier stage, such as `trine.factorize`), holds QatLinear layers
            (`trine.convert` packs those), is the result of torch.compile, or
            cannot be copied; a weight that is to be compressed holds NaN or infinity; `recipe` or
            `sample_inputs` of another form. What the model raises on the samples comes through.
    """
    _check(model, recipe)
    batches = as_batches(sample_inputs)
    found = candidates_of(model, recipe)
    layers = found.layers
    _check_candidates(found)
    calls = observe(model, {n: layers[n] for unit in found.units for n in unit}, batches)

    measurements = Measurements(timer)
    fused = _inside_fused_encoders(model)
    rows = {
        name: _kept(layers[name], name, found.choices[name], reason)
        for name, reason in found.kept.items()
    }
    replacements: dict[nn.Module, nn.Module] = {}
    for unit in found.units:
        if not any(calls[name] for name in unit):
            for name in unit:
                rows[name] = _kept(layers[name], name, found.choices[name], "no sample reached it")
            continue
        packed = {layers[name]: _pack(layers[name], found.choices[name]) for name in unit}
        share_tables(packed)
        for row in _decide(unit, found, packed, calls, measurements, recipe.prefer):
            if row.swapped:
                replacements[layers[row.name]] = packed[layers[row.name]]
                if layers[row.name] in fused:
                    row = replace(row, reason=f"{row.reason}; {_NOT_MEASURED}")
            rows[row.name] = row

    small = packed_copy(model, replacements).eval()
    in_order = tuple(rows[name] for name in layers)
    small.report = CompressionReport(recipe, in_order, bytes_of(model), bytes_of(small))
    return small


def _check(model: nn.Module, recipe: Recipe) -> None:
    require_module(model, "compress")
    if not isinstance(recipe, Recipe):
        raise ValueError(f"compress takes a trine.Recipe; got {type(recipe).__name__}")
    require_place_for_report(model, "compress")
    if hasattr(model, "_orig_mod"):
        raise ValueError("compress the model first and call torch.compile on the result")
    if any(isinstance(module, QatLayer) for module in model.modules()):
        raise ValueError("the model was trained under quantisation; trine.convert packs it")


def _check_candidates(found: Candidates) -> None:
    if not found.layers:
        raise ValueError(
            "compress: the model holds no linear layer (nn.Linear or Conv1D), and no nn.Conv2d or "
            "nn.Embedding of which the recipe speaks"
        )
    for name in (name for unit in found.units for name in unit):
        layer, choice = found.layers[name], found.choices[name]
        if isinstance(layer, nn.Conv2d) and choice == "int8-static":
            raise ValueError(
                f"compress: convolution {name!r} is to be {choice!r}, whose scale is found from "
                "data; take trine.quantize.post_training or prepare_qat"
            )
        if layer.weight.is_meta:
            raise ValueError(f"compress: layer {name!r} is on the meta device; load it first")
        if not layer.weight.detach().isfinite().all():
            raise ValueError(
                f"compress: the weight of layer {name!r} holds NaN or infinity; repair it, or "
                'leave it out with a recipe that says "float" for it'
            )


def _inside_fused_encoders(model: nn.Module) -> set[nn.Module]:
    return {
        module
        for encoder in model.modules()
        if isinstance(encoder, nn.TransformerEncoderLayer)
        for module in encoder.modules()
    }


def _pack(layer: nn.Module, choice: str) -> nn.Module:
    if isinstance(layer, nn.Embedding):
        return Int8Embedding.from_embedding(layer)
    if isinstance(layer, nn.Conv2d):
        return Int8Conv2d.from_conv(layer)
    return pack_linear(layer, choice)


def _time(
    layer: nn.Module,
    packed: nn.Module,
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
            call.image,
        )
        for call, count in calls.items()
    )


def _decide(
    unit: tuple[str, ...],
    found: Candidates,
    packed: Mapping[nn.Module, nn.Module],
    calls: Mapping[str, Counter[Call]],
    measurements: Measurements,
    prefer: str,
) -> list[LayerReport]:
    """One report for each layer of the unit; a shared table counts as the first one's."""
    trials = []
    for name in unit:
        layer, choice = found.layers[name], found.choices[name]
        timings = _time(layer, packed[layer], choice, calls[name], measurements)
        before, after = bytes_of(layer), bytes_of(packed[layer])
        if trials:
            before -= layer.weight.nbytes
            after -= packed[layer].packed_weight.nbytes + packed[layer].weight_scale.nbytes
        trials.append(LayerReport(name, choice, True, "", before, after, timings))
    float_seconds = sum(trial.float_seconds for trial in trials)
    seconds = sum(trial.compressed_seconds for trial in trials)
    reason = f"measured {float_seconds / seconds:.2f} times as fast as float"
    if len(unit) > 1:
        reason += f", all layers of one table ({', '.join(unit)}) together"
    if prefer == "size":
        swapped = sum(t.bytes_after for t in trials) < sum(t.bytes_before for t in trials)
        reason = f"{'smaller' if swapped else 'not smaller'}; {reason}"
    elif isinstance(found.layers[unit[0]], nn.Embedding):
        swapped = seconds <= _NOT_SLOWER * float_seconds
    else:
        swapped = seconds < float_seconds
    return [
        replace(
            trial,
            swapped=swapped,
            reason=reason,
            bytes_after=trial.bytes_after if swapped else trial.bytes_before,
        )
        for trial in trials
    ]


def _kept(layer: nn.Module, name: str, choice: str, reason: str) -> LayerReport:
    size = bytes_of(layer)
    return LayerReport(name, choice, False, reason, size, size)
