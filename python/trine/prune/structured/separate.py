"""nn.MultiheadAttention in a form of which heads can be removed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from trine.calibration.probe import probing, run, tensors_in
from trine.compress.edits import record
from trine.compress.layers import close_fast_paths, copy_model, require_module
from trine.nn import SeparateAttention
from trine.prune.structured.remove import same_outputs


def separate_attention(model: nn.Module) -> nn.Module:
    """A copy of `model` with `trine.nn.SeparateAttention` for each nn.MultiheadAttention.

    It computes the same up to rounding. Its projections are layers like any other: a `Pruner` takes
    their heads and weights, `trace` shows what is coupled, `compress` and `factorize` swap them.
    `prune_structured` and `remove` do this themselves, where heads go. `trine.save` and
    `trine.load` hold the copy.

    Raises ValueError where the model has none, or for one that cannot be separated (it is of a
    subclass, was changed, shares parameters or adds keys of its own).
    """
    require_module(model, "separate_attention")
    reasons = attentions(model)
    if not reasons:
        raise ValueError("separate_attention: the model has no nn.MultiheadAttention")
    for name, reason in reasons.items():
        if reason is not None:
            raise ValueError(f"separate_attention: nn.MultiheadAttention {name!r} {reason}")
    separated = copy_model(with_separate(model, reasons), {})
    record(model, separated)
    return separated


def attentions(model: nn.Module) -> dict[str, str | None]:
    """Every nn.MultiheadAttention by its first name, with why it cannot be separated, or None."""
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    return {
        name: _obstacle(module, users)
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }


def _obstacle(attention: nn.MultiheadAttention, users: Counter[int]) -> str | None:
    changed = (
        type(attention) is not nn.MultiheadAttention
        or "forward" in vars(attention)
        or attention._modules.keys() != {"out_proj"}
        or type(attention.out_proj) is not NonDynamicallyQuantizableLinear
        or parametrize.is_parametrized(attention)
    )
    if changed:
        return "is not as torch builds it, so nothing of it is removed"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "adds keys of its own (add_bias_kv, add_zero_attn), so its heads stay"
    if any(users[id(parameter)] > 1 for parameter in attention.parameters()):
        return "shares parameters with another module, so its heads stay"
    return None


def separable(model: nn.Module, batches: list[Any]) -> tuple[nn.Module, dict[str, str]]:
    """The model with all attention separated that can be, and why the rest cannot.

    The model itself, where it needs the parameters of nn.MultiheadAttention for itself.
    """
    found = attentions(model)
    reasons = {name: reason for name, reason in found.items() if reason is not None}
    names = found.keys() - reasons.keys()
    if not names:
        return model, reasons
    separated = with_separate(model, names)
    before = _outputs(model, batches)
    try:
        if same_outputs(_outputs(separated, batches), before):
            return separated, reasons
        reason = "gives other outputs when separated, so nothing of it is removed"
    except Exception as error:  # the model's own code may raise anything; the report quotes it
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        reason = f"cannot be separated, for the model's own code then raises {what}"
    return model, reasons | dict.fromkeys(names, reason)


def _outputs(model: nn.Module, batches: list[Any]) -> list:
    with probing(model) as probe:
        return [x for batch in batches for x in tensors_in(run(probe, batch))]


def with_separate(model: nn.Module, names: Collection[str]) -> nn.Module:
    """A copy with these separated, which has all other parameters (and gradients) in common."""
    replaced = [model.get_submodule(name) for name in names]
    own = {id(p) for attention in replaced for p in attention.parameters()}
    shared = {p: p for p in model.parameters() if id(p) not in own}
    new = {attention: SeparateAttention.from_attention(attention) for attention in replaced}
    separated = copy_model(model, {**shared, **new})
    close_fast_paths(separated, SeparateAttention)
    return separated
