"""Factorise the layers of a model: choose ranks, build, measure, keep what is better as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from trine.compress.edits import record
from trine.compress.layers import bytes_of, close_fast_paths, copy_model
from trine.compress.measure import Timer
from trine.compress.observe import as_batches
from trine.compress.save_pretrained import prepare_save_pretrained
from trine.evaluate.latency import alternate
from trine.factorize.layers import choose_layers
from trine.factorize.measure import Stopwatch, inputs_of
from trine.factorize.plan import AnyRank, Method, Plan
from trine.factorize.ranks import Ranks
from trine.factorize.report import FactorizationReport, LayerChange
from trine.factorize.svd import Svd


def factorize(
    model: nn.Module,
    ranks: Ranks,
    method: Method | None = None,
    *,
    layers: str | Iterable[str] = "*",
    skip: str | Iterable[str] = (),
    sample_inputs: Any = None,
    timer: Timer = alternate,
    progress: Callable[[int], None] = lambda done: None,
) -> nn.Module:
    """A copy of `model` whose chosen layers are products of smaller ones, where that is less.

    A layer stays as it is where its factors would hold as many parameters as it does and, where
    `sample_inputs` are given, where they are not measured to be faster at the shapes of those.
    The factors are plain layers: they train, are quantised by `trine.compress` and
    `trine.quantize.prepare_qat` by the names `layer.first` and `layer.second`, and are saved by
    `trine.save`. `model` itself is not touched.

    Args:
        model: any module.
        ranks: `Rank(16)`, `Energy(0.95)`, `Parameters(0.5)` or `Speedup(1.5)`.
        method: `Svd()` by default; `Svd(moments)`, `SvdWithSparse24()`, `Tucker()`, `Cp()`.
        layers, skip: patterns of fnmatch for names: of those that any of `layers` and none of
            `skip` matches, every layer that the method is for.
        sample_inputs: what the model is typically called with, as for `trine.compress`.
        timer: takes calls by name, returns seconds per call by name.
        progress: called with the number of steps that are done, two for each layer that can be
            changed: its decomposition, and what is made of it.

    Returns:
        The copy. Its attribute `report`, a `FactorizationReport`, says for each layer what became
        of it, the error and the measured speed; print it for a table.

    Raises:
        ValueError: no layer to change, a layer asked for by its name that must stay (its weight is
            shared, empty, computed or read directly), NaN or infinity in a weight, a rank that a
            layer does not have, a budget that cannot be met, samples of another form, a model that
            cannot be copied. What the model raises on the samples comes through.
    """
    method = method or Svd()
    chosen, stay = choose_layers(model, method.kinds, layers, skip, "factorize")
    free = {name: layer for name, layer in chosen.items() if name not in stay}
    stopwatch = None
    if sample_inputs is not None:
        stopwatch = Stopwatch(timer, inputs_of(model, free, as_batches(sample_inputs)))
    plans = {}
    for name, layer in free.items():
        plans[name] = method.plan(name, layer)
        progress(len(plans))
    decided = ranks.choose(plans, None if stopwatch is None else _clock(free, plans, stopwatch))

    rows = {name: _kept(name, chosen[name], reason) for name, reason in stay.items()}
    replacements = {}
    for number, (name, layer) in enumerate(free.items(), 1):
        rows[name], built = _decide(name, layer, plans[name], decided[name], stopwatch)
        if rows[name].changed:
            replacements[layer] = built
        progress(len(plans) + number)
    return changed_copy(model, replacements, [rows[name] for name in chosen])


def changed_copy(
    model: nn.Module, replacements: dict[nn.Module, nn.Module], rows: Iterable[LayerChange]
) -> nn.Module:
    """A copy with the replacements, finished."""
    small = copy_model(model, replacements)
    for built in replacements.values():
        close_fast_paths(small, type(built))
    return finished(model, small, rows)


def finished(model: nn.Module, small: nn.Module, rows: Iterable[LayerChange]) -> nn.Module:
    """`small`, a changed copy of `model`, with its `report` and what saving it needs to know."""
    record(model, small)
    prepare_save_pretrained(small)
    small.report = FactorizationReport(tuple(rows), bytes_of(model), bytes_of(small))
    return small


def _clock(layers: dict[str, nn.Module], plans: dict[str, Plan], stopwatch: Stopwatch):
    def ratio(name: str, rank: AnyRank) -> float:
        seconds = stopwatch.seconds(name, layers[name], plans[name].build(rank))
        return 0.0 if seconds is None else seconds[0] / seconds[1]

    return ratio


def _decide(
    name: str, layer: nn.Module, plan: Plan, rank: AnyRank | None, stopwatch: Stopwatch | None
) -> tuple[LayerChange, nn.Module | None]:
    if stopwatch is not None and not stopwatch.inputs[name]:
        return _kept(name, layer, "no sample reached it"), None
    if rank is None:
        return _kept(name, layer, "no rank is worth it"), None
    parameters = plan.size(rank)
    if parameters >= plan.dense:
        reason = f"rank {rank} takes {parameters} parameters, the layer {plan.dense}"
        return _kept(name, layer, reason), None
    built = plan.build(rank)
    seconds = None if stopwatch is None else stopwatch.seconds(name, layer, built)
    changed, how = True, "not measured"
    if seconds is not None:
        changed = seconds[1] < seconds[0]
        how = f"measured {seconds[0] / seconds[1]:.2f} times as fast"
    row = LayerChange(
        name,
        changed,
        f"rank {rank}, {how}",
        bytes_before=bytes_of(layer),
        bytes_after=bytes_of(built if changed else layer),
        error=plan.error(built) if changed else None,
        float_seconds=seconds and seconds[0],
        seconds=seconds and seconds[1],
    )
    return row, built


def _kept(name: str, layer: nn.Module, reason: str) -> LayerChange:
    size = bytes_of(layer)
    return LayerChange(name, False, reason, size, size)
