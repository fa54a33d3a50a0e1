"""Run a model once on examples and find out which slices of its parameters belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from trine.calibration.probe import check_fits, module_names, probing, run, tensors_in
from trine.compress.layers import require_module
from trine.compress.observe import as_batches
from trine.prune.structured.groups import Groups, leaves_of, make_groups
from trine.prune.structured.labels import Label, fixed, freeze, fresh
from trine.prune.structured.rules import NoRule, Step, rule_for
from trine.prune.structured.units import Units


def trace(model: nn.Module, example_inputs: Any) -> Groups:
    """The groups of slices of parameters that can be removed from `model` together.

    A copy that shares the parameters runs in evaluation mode, and every operator of aten says
    which positions of its tensors belong together: a convolution's filters with the batch norm
    and the channels that read them, queries with keys, all that meets in a residual sum. What
    goes through an operator without a rule, into the output or in from outside keeps its size.
    So do the heads of nn.MultiheadAttention, which holds them to its width: `prune_structured` and
    `remove` trace `separate_attention(model)` instead.

    Args:
        model: any module; it is left untouched.
        example_inputs: a tensor, a tuple of arguments, a mapping of keyword arguments, or a list of
            such calls; together they should reach every layer, for others cannot be pruned.

    Raises:
        ValueError: no module, or one of torch.compile; examples that it cannot be called with; it
            cannot be copied. What the model raises on the examples comes through.
    """
    return trace_batches(model, checked_batches(model, example_inputs), {})


def checked_batches(model: nn.Module, example_inputs: Any) -> list[Any]:
    """The examples as a list of calls; raises ValueError as `trace` does."""
    require_module(model, "trace")
    if hasattr(model, "_orig_mod"):
        raise ValueError("prune the model first and call torch.compile on the result")
    batches = as_batches(example_inputs)
    for batch in batches:
        check_fits(model, batch)
    return batches


def trace_batches(model: nn.Module, batches: list[Any], attention: Mapping[str, str]) -> Groups:
    """`trace`; `attention` says of every nn.MultiheadAttention by name why it is not separate."""
    units = Units()
    with probing(model) as probe, module_names(probe) as stack:
        leaves = {name: (x, fresh(x.shape, units)) for name, x in leaves_of(probe)}
        tracer = _Tracer(units, leaves.values(), stack)
        _keep_what_is_read_whole(probe, leaves, units, attention)
        for batch in batches:
            with tracer:
                output = run(probe, batch)
            for tensor in tensors_in(output):
                freeze(tracer.label(tensor), units, "the model's output keeps its size")
    for name, (tensor, label) in leaves.items():
        if id(tensor) not in tracer.used:
            freeze(label, units, f"no example reached {name}")
    units.settle()
    labels = {name: label for name, (_, label) in leaves.items()}
    return make_groups(probe, labels, units, dict(tracer.without_rule))


class _Tracer(TorchDispatchMode):
    def __init__(self, units: Units, leaves: Any, stack: list[str]) -> None:
        super().__init__()
        self.used: set[int] = set()
        self.without_rule: dict[str, str] = {}  # operators, with the first module that called them
        self._units = units
        self._stack = stack
        self._when_read: dict[int, list[Callable[[], None]]] = {}
        self._leaves = {id(tensor) for tensor, _ in leaves}
        # Tensors are held on to, so that an id stays one tensor's.
        self._labels = {id(tensor): (tensor, label) for tensor, label in leaves}

    def label(self, tensor: Tensor) -> Label:
        if id(tensor) in self._leaves:
            self.used.add(id(tensor))
        for action in self._when_read.pop(id(tensor), ()):
            action()
        known = self._labels.get(id(tensor))
        return fixed(tensor.shape) if known is None else known[1]

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = operator(*args, **kwargs)
        name = operator._schema.name.removeprefix("aten::").removesuffix("_")
        step = Step(self._units, self.label, args, kwargs, out, name, self._stack[-1])
        results = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        for tensor, label in zip(results, self._apply(operator, step), strict=False):
            if label is not None:
                self._labels[id(tensor)] = (tensor, label)
                if step.when_read:
                    self._when_read[id(tensor)] = step.when_read
        return out

    def _apply(self, operator: torch._ops.OpOverload, step: Step) -> list[Label | None]:
        rule = rule_for(operator)
        try:
            if rule is not None:
                return list(rule(step))
        except NoRule:
            pass
        name = operator._schema.name
        for x in pytree.tree_leaves((step.args, step.kwargs)):
            if isinstance(x, Tensor):
                label = self.label(x)
                if label.blocks:
                    self.without_rule.setdefault(name, step.where)
                freeze(label, self._units, f"{name} in {step.where or 'the model'} has no rule")
        return []


def _keep_what_is_read_whole(
    probe: nn.Module,
    leaves: Mapping[str, tuple[Tensor, Label]],
    units: Units,
    reasons: Mapping[str, str],
) -> None:
    """nn.MultiheadAttention checks that its heads fill its width: nothing of it can be removed."""
    for name, module in probe.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            reason = reasons.get(
                name, "checks its own sizes; separate_attention makes its heads free"
            )
            held = {id(p) for p in module.parameters()}
            for tensor, label in leaves.values():
                if id(tensor) in held:
                    freeze(label, units, f"nn.MultiheadAttention {name!r} {reason}")
