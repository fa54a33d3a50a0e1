"""Rules by the operators' names, and what a rule is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trine.prune.structured.labels import Label, keep_size
from trine.prune.structured.units import Units


class NoRule(Exception):
    """The rule does not cover this way of calling the operator."""


@dataclass(frozen=True)
class Step:
    """One call of an operator."""

    units: Units
    label: Callable[[Tensor], Label]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any  # what it returned
    name: str  # of the operator
    where: str  # the module that called it
    # What to do when something reads a result: most models never look at attention weights.
    when_read: list[Callable[[], None]] = field(default_factory=list)

    def reason(self, text: str) -> str:
        return f"{self.name} in {self.where or 'the model'}: {text}"

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        return self.args[place] if place < len(self.args) else self.kwargs.get(name, default)

    def keep_sizes(self, label: Label, dims: Sequence[int], text: str) -> Label:
        for dim in dims:
            label = keep_size(label, dim % len(label.shape), self.units, self.reason(text))
        return label


# Labels of the tensors returned, in order; those left over, and None, are fixed in all dimensions.
Rule = Callable[[Step], Sequence[Label | None]]

_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the function for the operators of aten with these names."""

    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[name] = function
        return function

    return register


def rule_for(operator: torch._ops.OpOverload) -> Rule | None:
    """None where there is none. Operators that torch tags as pointwise share one."""
    namespace, _, name = operator._schema.name.partition("::")
    if namespace != "aten":
        return None
    found = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
    if found is None and torch.Tag.pointwise in operator.tags:
        found = _RULES["add"]
    return found
