"""ReLU and GELU behind packed layers, computed by these where that is measured to pay."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from trine.compress.edits import record
from trine.compress.fusion_report import FusionReport, ModuleFusion
from trine.compress.layers import require_module
from trine.compress.measure import Timer
from trine.compress.observe import Call, as_batches, observe
from trine.compress.packed_copy import packed_copy
from trine.compress.readers import Readers, find_readers
from trine.evaluate.latency import alternate
from trine.nn import Int8Linear, TernaryLinear

_WITH_ACTIVATION = (Int8Linear, TernaryLinear)


def fuse_activations(
    model: nn.Module, sample_inputs: Any, *, timer: Timer = alternate
) -> nn.Module:
    """A copy of `model`, in evaluation mode, whose packed layers compute the activations behind
    them.

    Runs a copy over the samples to see what reads the result of each `Int8Linear` and
    `TernaryLinear`. Where that is a ReLU or GELU module alone, which reads nothing else, times
    both as they are and with the layer's `activation` set, at the shapes seen, and where that takes
    less time in total sets it and puts an nn.Identity in place of the module. Modules are nn.ReLU,
    nn.GELU of both kinds, and those of transformers that compute the same up to rounding (tried on
    numbers). Functions that a forward calls itself are not seen.

    The result is the model's up to the rounding of the activation, which is now computed in float32
    before the layer's result is rounded; csrc/common/activation.h states its error. `trine.save`
    and `trine.load` take the copy; where `like` is needed it returns the float model.

    Args:
        model: any module with packed layers, as `trine.compress` and `trine.convert` give it. It is
            left untouched.
        sample_inputs: as for `trine.compress`. What it does not reach is not seen: layers whose
            results other inputs send elsewhere must not be fused.
        timer: takes calls by name, returns seconds per call by name.

    Returns:
        The copy. Its attribute `activations_report`, a `FusionReport`, says for each module
        whether it was fused, the measured ratio and the reason; print it for a table.

    Raises:
        ValueError: the model has no such activation or no such layer, is the result of
            torch.compile, or cannot be copied. What the model raises on the samples comes through.
    """
    require_module(model, "fuse_activations")
    if hasattr(model, "_orig_mod"):
        raise ValueError("fuse the activations first and call torch.compile on the result")
    kinds = _activations(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, _WITH_ACTIVATION)}
    if not kinds or not layers:
        lacks = "ReLU or GELU module" if layers else "Int8Linear or TernaryLinear layer"
        raise ValueError(f"fuse_activations: the model holds no {lacks}")
    batches = as_batches(sample_inputs)
    nothing: dict[str, Any] = dict.fromkeys(layers, lambda *_: None)
    readers = find_readers(model, nothing, frozenset(kinds), batches)
    calls = observe(model, {name: model.get_submodule(name) for name in kinds}, batches)

    rows: list[ModuleFusion] = []
    replacements: dict[nn.Module | Tensor, nn.Module | Tensor] = {}
    timings = _Timings(timer)
    for name, kind in kinds.items():
        module = model.get_submodule(name)
        before = tuple(layer for layer, found in readers.items() if name in found.layers)
        reason = _reason_against(module, [layers[n] for n in before], [readers[n] for n in before])
        if reason is None and calls[name].total() != sum(readers[n].calls.total() for n in before):
            reason = "it reads other results, too"
        if reason is not None:
            rows.append(ModuleFusion(name, False, reason, before))
            continue
        fused = {layers[n]: _with_activation(layers[n], kind) for n in before}
        apart_seconds = fused_seconds = 0.0
        for layer_name in before:
            layer = layers[layer_name]
            for call, count in readers[layer_name].calls.items():
                apart, together = timings.seconds(layer, module, fused[layer], call)
                apart_seconds += count * apart
                fused_seconds += count * together
        pays = fused_seconds < apart_seconds
        reason = f"measured {apart_seconds / fused_seconds:.2f} times as fast, with its layers"
        rows.append(ModuleFusion(name, pays, reason, before, apart_seconds, fused_seconds))
        if pays:
            replacements |= {**fused, module: nn.Identity()}

    small = packed_copy(model, replacements).eval()
    record(model, small)
    small.activations_report = FusionReport("activation", tuple(rows))
    return small


def _activations(model: nn.Module) -> dict[str, str]:
    """By the names of modules, which activation of the layers each is."""
    kinds = {name: _kind(module) for name, module in model.named_modules()}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def _kind(module: nn.Module) -> str | None:
    if type(module) is nn.ReLU:
        return "relu"
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    if type(module).__module__ != "transformers.activations" or module.state_dict():
        return None
    x = torch.linspace(-8, 8, 513)
    try:
        with torch.no_grad():
            y = module.forward(x)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None  # it wants more than one tensor
    formulas = {
        "gelu": nn.functional.gelu(x),
        "gelu_tanh": nn.functional.gelu(x, approximate="tanh"),
    }
    for kind, expected in formulas.items():
        if isinstance(y, Tensor) and torch.allclose(y, expected, rtol=0, atol=2e-6):
            return kind
    return None


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _reason_against(
    module: nn.Module, layers: list[nn.Module], readers: list[Readers]
) -> str | None:
    if not layers:
        return "it reads no result of a packed layer"
    if _has_hooks(module) or any(map(_has_hooks, layers)):
        return "it or its layer has hooks"
    if any(layer.activation is not None for layer in layers):
        return "its layer has an activation already"
    for found in readers:
        if found.other is not None:
            return f"of its layer's result, {found.other}"
        if len(found.layers) > 1:
            return f"its layer's result is read by {' and '.join(found.layers)}"
    return None


def _with_activation(layer: nn.Module, kind: str) -> nn.Module:
    fused = copy.deepcopy(layer)
    fused.activation = kind
    return fused


class _Timings:
    """Of layers with their activations, each distinct case once."""

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._known: dict[tuple, tuple[float, float]] = {}

    def seconds(
        self, layer: nn.Module, activation: nn.Module, fused: nn.Module, call: Call
    ) -> tuple[float, float]:
        """Seconds as they are and fused, on random data."""
        case = (type(layer), repr(fused), repr(activation), call)
        if case not in self._known:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(call.rows, layer.in_features, generator=generator)
            x = x.to(layer.device, call.dtype)
            autocast = call.autocast is not None
            with torch.autocast(layer.device.type, call.autocast, enabled=autocast):
                calls = {
                    "apart": lambda: activation.forward(layer.forward(x)),
                    "fused": lambda: fused.forward(x),
                }
                seconds = self._timer(calls)
            self._known[case] = seconds["apart"], seconds["fused"]
        return self._known[case]
