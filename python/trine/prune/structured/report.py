"""What structured pruning removed, what stayed and why: plain data that prints as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from trine.calibration.probe import probing, run
from trine.prune.structured.groups import Groups
from trine.prune.structured.remove import kept_positions


@dataclass(frozen=True)
class GroupReport:
    """Units before and after; `removed` are the numbers of those that went."""

    name: str
    kind: str
    before: int
    after: int
    removed: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class RemovalReport:
    """All groups, and the whole model's parameters and multiply-adds for one example call.

    `positions` says of every parameter that shrank what is left of its dimensions.
    `kept` says of the layers whose outputs could not go why; `without_rule` names the operators
    that no rule covers, each with a module that calls it. MACs are those of products, convolutions
    and attention.
    """

    groups: tuple[GroupReport, ...]
    kept: Mapping[str, str]
    without_rule: Mapping[str, str]
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    positions: Mapping[str, Mapping[int, np.ndarray]]

    def __str__(self) -> str:
        width = max((len(group.name) for group in self.groups), default=0)
        lines = [f"{g.name:{width}}  {g.kind:7}  {g.before} -> {g.after}" for g in self.groups]
        lines += [f"{name}: kept, {reason}" for name, reason in self.kept.items()]
        lines += [
            f"{operator} (in {place or 'the model'}) has no rule: what goes through it was kept"
            for operator, place in self.without_rule.items()
        ]
        lines.append(f"parameters {self.parameters_before:,} -> {self.parameters_after:,}")
        lines.append(f"MACs {self.macs_before:,} -> {self.macs_after:,}")
        return "\n".join(lines)


def report_of(
    model: nn.Module,
    small: nn.Module,
    groups: Groups,
    chosen: Mapping[str, np.ndarray],
    batches: list[Any],
) -> RemovalReport:
    rows = []
    for name, group in groups.items():
        removed = tuple(sorted(chosen.get(name, np.empty(0, np.int64)).tolist()))
        rows.append(GroupReport(name, group.kind, group.size, group.size - len(removed), removed))
    return RemovalReport(
        tuple(rows),
        groups.frozen,
        groups.without_rule,
        parameters(model),
        parameters(small),
        macs(model, batches[0]),
        macs(small, batches[0]),
        kept_positions(groups, chosen),
    )


def parameters(model: nn.Module) -> int:
    """The number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, batch: Any) -> int:
    """Multiply-adds of products, convolutions and attention in one call of the model."""
    counter = _Counter()
    with probing(model) as probe, counter:
        run(probe, batch)
    return counter.flops // 2


class _Counter(TorchDispatchMode):
    """torch's formulas; its own counter follows gradients, too, and fails on some models."""

    flops = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        formula = flop_registry.get(operator._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        elif operator is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            (_, _, keys, width), value_width = args[1].shape, args[2].shape[-1]
            rows = args[0].numel() // width  # of all heads; keys may have fewer
            self.flops += 2 * rows * keys * (width + value_width)
        return out
