"""Norms that quantise for the packed layers behind them, put in where that is measured to pay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trine.calibration.probe import probing, run
from trine.compress.edits import record
from trine.compress.fusion_report import FusionReport, ModuleFusion
from trine.compress.layers import obstacles_of, require_module
from trine.compress.measure import Timer
from trine.compress.observe import Call, as_batches
from trine.compress.packed_copy import packed_copy
from trine.compress.readers import Readers, find_readers
from trine.evaluate.latency import alternate
from trine.nn import PackedLinear, QuantizingLayerNorm, QuantizingRMSNorm

_FUSED = (QuantizingLayerNorm, QuantizingRMSNorm)


def fuse_norms(model: nn.Module, sample_inputs: Any, *, timer: Timer = alternate) -> nn.Module:
    """A copy of `model`, in evaluation mode, whose norms quantise for the layers that read them.

    A norm and the INT8 and ternary layers behind it go over its result three times and more: it is
    written, and each layer reads and quantises it. `trine.nn.QuantizingLayerNorm` and
    `QuantizingRMSNorm` do norm and quantisation in one pass, once for all readers.

    Runs a copy over the samples to see what reads each norm's result, times the norm together with
    its readers as they are and fused, at the shapes seen, and puts the fused one in where that
    takes less time in total. Norms are nn.LayerNorm, nn.RMSNorm and the RMSNorms of transformers.
    Left alone, each with its reason: a norm whose result anything else reads (a residual sum, as in
    BERT, a float layer, the caller), over several dimensions, with hooks, with a weight that is
    shared or none; one of transformers in another dtype than float32 (it rounds before it
    multiplies by the weight, too) or another arithmetic (Gemma's).

    The result is the model's up to the rounding of its norms: a few units of the last place of
    float32 before they are rounded to the dtype of x, and then here and there one step of int8.
    Under autocast the fused norm's result is not rounded to the dtype of autocast first.

    As for all of trine's layers, serve it under torch.no_grad() or torch.inference_mode(): where a
    gradient is wanted the norms are torch's.

    `trine.save` and `trine.load` take the copy; where `like` is needed it returns the float model.

    Args:
        model: any module with norms and packed layers, as `trine.compress` and `trine.convert` give
            it. It is left untouched.
        sample_inputs: as for `trine.compress`. What it does not reach is not seen: norms that other
            inputs send elsewhere must not be fused.
        timer: takes calls by name, returns seconds per call by name.

    Returns:
        The copy. Its attribute `norms_report`, a `FusionReport`, says for each norm whether it was
        fused, the measured ratio and the reason; print it for a table.

    Raises:
        ValueError: the model has no norm, is the result of torch.compile, or cannot be copied; the
            copy does not take the samples. What the model raises on the samples comes through.
    """
    _check(model)
    batches = as_batches(sample_inputs)
    norms, layers = _norms(model), _layers_that_take_rows(model)
    left_alone = _obstacles(model, norms)
    sources = {name: _difference for name in norms.keys() - left_alone.keys()}
    readers = find_readers(model, sources, frozenset(layers), batches)

    timings = _Timings(timer)
    rows: list[ModuleFusion] = []
    replacements: dict[nn.Module, nn.Module] = {}
    for name, norm in norms.items():
        reason = left_alone.get(name) or _reason_of(readers[name])
        if reason:
            rows.append(ModuleFusion(name, False, reason))
            continue
        fused = _fused(norm)
        of_norm = [layers[reader] for reader in readers[name].layers]
        row = _measured(name, norm, fused, of_norm, readers[name], timings)
        rows.append(row)
        if row.fused:
            replacements[norm] = fused

    small = packed_copy(model, replacements).eval()
    record(model, small)
    small.norms_report = FusionReport("norm", tuple(rows))
    if replacements:
        _try(small, batches)
    return small


def _check(model: nn.Module) -> None:
    require_module(model, "fuse_norms")
    if hasattr(model, "_orig_mod"):
        raise ValueError("fuse the norms first and call torch.compile on the result")
    if not _norms(model):
        raise ValueError("fuse_norms: the model holds no LayerNorm or RMSNorm")


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm | nn.RMSNorm) or _is_of_transformers(module)
    }


def _is_of_transformers(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__.startswith("transformers.") and kind.__name__.endswith("RMSNorm")


def _layers_that_take_rows(model: nn.Module) -> dict[str, PackedLinear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear)
        and module.takes_quantized_rows
        and not _has_hooks(module)
    }


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _obstacles(model: nn.Module, norms: dict[str, nn.Module]) -> dict[str, str]:
    of_transformers = {type(norm) for norm in norms.values() if _is_of_transformers(norm)}
    found = obstacles_of(model, norms, known=tuple(of_transformers))
    for name, norm in norms.items():
        if isinstance(norm, _FUSED):
            found[name] = "it quantises already"
        elif _has_hooks(norm):
            found[name] = "it has hooks, which expect a tensor"
        elif name not in found and norm.weight.dim() != 1:
            found[name] = "it is a norm over several dimensions"
        elif type(norm) in of_transformers and not _eps_names(norm):
            found[name] = f"{type(norm).__name__} has no eps that is known"
    return found


def _eps_names(norm: nn.Module) -> list[str]:
    return [name for name in ("eps", "variance_epsilon") if hasattr(norm, name)]


def _difference(norm: nn.Module, x: Tensor, result: Tensor) -> str | None:
    """Why the fused norm would not give this result."""
    if not _is_of_transformers(norm):
        return None
    kind = type(norm).__name__
    if x.dtype != torch.float32 or result.dtype != torch.float32:
        dtype = str(x.dtype).removeprefix("torch.")
        return f"in {dtype} {kind} rounds twice, before it multiplies by the weight, too"
    expected = F.rms_norm(x, norm.weight.shape, norm.weight, getattr(norm, _eps_names(norm)[0]))
    if not torch.allclose(result, expected, rtol=1e-5, atol=0, equal_nan=True):
        return f"{kind} computes something else than RMSNorm"
    return None


def _reason_of(readers: Readers) -> str | None:
    if not readers.calls:
        return "no sample reached it"
    if readers.other is not None:
        return readers.other
    return None if readers.layers else "nothing reads it"


def _fused(norm: nn.Module) -> nn.Module:
    kind = QuantizingLayerNorm if isinstance(norm, nn.LayerNorm) else QuantizingRMSNorm
    return kind.from_norm(copy.deepcopy(norm))


class _Timings:
    """Of norms with their readers, each distinct case once."""

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._known: dict[tuple, tuple[float, float]] = {}

    def seconds(
        self, norm: nn.Module, fused: nn.Module, layers: list[PackedLinear], call: Call
    ) -> tuple[float, float]:
        """Seconds as they are and fused, on random data."""
        weight = norm.weight
        kinds = (repr(norm), weight.dtype, weight.device, *map(repr, layers))
        if (kinds, call) not in self._known:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(call.rows, len(weight), generator=generator)
            x = x.to(weight.device, call.dtype)

            def timed(first: nn.Module) -> Callable[[], object]:
                def run_all() -> None:
                    normed = first.forward(x)
                    for layer in layers:
                        layer.forward(normed)

                return run_all

            autocast = call.autocast is not None
            with torch.autocast(weight.device.type, call.autocast, enabled=autocast):
                seconds = self._timer({"apart": timed(norm), "fused": timed(fused)})
            self._known[kinds, call] = seconds["apart"], seconds["fused"]
        return self._known[kinds, call]


def _measured(
    name: str,
    norm: nn.Module,
    fused: nn.Module,
    layers: list[PackedLinear],
    readers: Readers,
    timings: _Timings,
) -> ModuleFusion:
    apart_seconds = fused_seconds = 0.0
    for call, count in readers.calls.items():
        apart, together = timings.seconds(norm, fused, layers, call)
        apart_seconds += count * apart
        fused_seconds += count * together
    return ModuleFusion(
        name,
        fused_seconds < apart_seconds,
        f"measured {apart_seconds / fused_seconds:.2f} times as fast, with its readers",
        tuple(readers.layers),
        apart_seconds,
        fused_seconds,
    )


def _try(small: nn.Module, batches: list[Any]) -> None:
    """What no watching shows: code that asks a tensor's class, say."""
    with probing(small) as probe:
        for batch in batches:
            try:
                run(probe, batch)
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(
                    "fuse_norms: with its norms fused the model fails on the samples, so it reads "
                    f"one of them in a way that was not seen: {error}"
                ) from error
