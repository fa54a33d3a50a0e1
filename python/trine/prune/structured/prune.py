"""Choose what is removed, by scores, and remove it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import nn

from trine.compress.edits import record
from trine.prune.criteria import Magnitude
from trine.prune.structured.choose import Importance, checked, choose, ratios_of, unit_scores
from trine.prune.structured.groups import Groups, output_dim
from trine.prune.structured.remove import Chosen, without
from trine.prune.structured.report import report_of
from trine.prune.structured.separate import attentions, separable, with_separate
from trine.prune.structured.trace import checked_batches, trace_batches


def prune_structured(
    model: nn.Module,
    example_inputs: Any,
    ratio: float | Mapping[str, float],
    *,
    importance: Importance | None = None,
    kinds: Iterable[str] = ("neuron", "channel", "head"),
    scope: str = "layer",
    multiple_of: int = 8,
    keep: str | Iterable[str] = (),
) -> nn.Module:
    """A smaller copy of `model`, without the neurons, channels and heads that matter least.

    What belongs together is removed together (see `trace`); a unit is worth the mean of the scores
    of the weights that go with it. On the examples the copy computes what the model computes with
    the removed weights at zero; this is checked. nn.MultiheadAttention that loses some of its heads
    becomes `trine.nn.SeparateAttention`, by whose projections (`q_proj`, ...) layers and groups are
    named; criteria that have collected gradients know those after `separate_attention`.

    Args:
        model: is left untouched.
        example_inputs: calls that together reach every layer (see `trace`).
        ratio: the share of units to remove, in [0, 1): of every group, or, where scope is
            "global", of all weights of the groups' units together. A mapping from patterns of
            layer names to ratios: the first that matches counts, groups that none matches stay.
        importance: a criterion of trine.prune, or a function like its `scores`: of the model and
            its layers by name, returns a tensor of the weight's shape for each (higher: kept).
            None: the magnitude (L2).
        kinds: what is removed: "neuron", "channel", "head" (a key-value head goes with its
            queries), "hidden". The last one is the width of a residual stream whose norms then
            see other statistics: the copy is the model with those features left out of the norms,
            too, which is not the same as setting them to zero.
        scope: "layer" takes the ratio from every group, "global" the worst units of all groups.
        multiple_of: what is left of the outputs of a layer that lost some is a multiple of it;
            rounded so that fewer units go, which are whole heads, too.
        keep: patterns (fnmatch) of layer names, whose groups stay as they are.

    Returns:
        The copy, in the modes and dtypes of the model. Its attribute `removal_report`, a
        `RemovalReport`, lists what was removed, what stayed and why; print it. `trine.save` and
        `trine.load` hold the copy without any change to the model's source.

    Raises:
        ValueError: an argument out of its range or a pattern that matches nothing; scores of NaN;
            nothing can be removed; the model's own code cannot run at the smaller sizes (the
            message names the module). The model is untouched.

    DepGraph (Fang et al. 2023, arXiv:2301.12900) has the idea of tracing what is coupled.
    """
    kinds = checked(ratio, kinds, scope, multiple_of)
    batches = checked_batches(model, example_inputs)
    whole, groups = _traced(model, batches)
    ratios = ratios_of(groups, ratio, kinds, (keep,) if isinstance(keep, str) else tuple(keep))
    values = unit_scores(whole, groups, ratios, Magnitude(2) if importance is None else importance)
    return _smaller(model, groups, choose(groups, ratios, values, scope, multiple_of), batches)


def remove(
    model: nn.Module, example_inputs: Any, outputs: Mapping[str, Iterable[int]]
) -> nn.Module:
    """A smaller copy of `model` without the named outputs of layers, and all that goes with them.

    Args:
        model, example_inputs: as for `prune_structured`, which tells of nn.MultiheadAttention, too.
        outputs: numbers of outputs by layer name. What they are coupled to goes too: one output of
            a query projection takes its whole head along.

    Raises:
        ValueError: no such layer or output; one that cannot go (the message says why); all outputs
            of a layer; a model whose own code cannot run at the smaller sizes.
    """
    batches = checked_batches(model, example_inputs)
    whole, groups = _traced(model, batches)
    chosen: dict[str, np.ndarray] = {}
    for layer, numbers in outputs.items():
        for name, units in _units_of(whole, groups, layer, sorted(set(numbers))).items():
            chosen[name] = np.union1d(chosen.get(name, units), units)
    for name, units in chosen.items():
        if len(units) == groups[name].size:
            raise ValueError(f"remove: nothing would be left of {name!r}; drop_layers drops layers")
    return _smaller(model, groups, chosen, batches)


def _traced(model: nn.Module, batches: list[Any]) -> tuple[nn.Module, Groups]:
    """The model, with attention separated where that can be, and its groups."""
    whole, reasons = separable(model, batches)
    return whole, trace_batches(whole, batches, reasons)


def _smaller(model: nn.Module, groups: Groups, chosen: Chosen, batches: list[Any]) -> nn.Module:
    """The copy without the chosen units; attention that lost none of its own stays as it is."""
    cut = [p.parameter for name, units in chosen.items() if len(units) for p in groups[name].slices]
    owners = {name.rpartition(".")[0].rpartition(".")[0] for name in cut}
    names = [name for name, reason in attentions(model).items() if not reason and name in owners]
    small = without(with_separate(model, names) if names else model, groups, chosen, batches)
    record(model, small)
    small.removal_report = report_of(model, small, groups, chosen, batches)
    return small


def _units_of(
    model: nn.Module, groups: Groups, layer: str, numbers: list[int]
) -> dict[str, np.ndarray]:
    weight = f"{layer}.weight"
    module = dict(model.named_modules()).get(layer)
    dim = None if module is None else output_dim(module, "weight")
    if dim is None:
        raise ValueError(f"remove: there is no linear, convolutional or embedding layer {layer!r}")
    size = module.weight.shape[dim]
    if not all(type(n) is int and 0 <= n < size for n in numbers):
        raise ValueError(f"remove: {layer!r} has outputs 0 to {size - 1}; got {numbers}")
    found: dict[str, np.ndarray] = {}
    left = set(numbers)
    for name, group in groups.items():
        for part in group.slices:
            if (part.parameter, part.dim) == (weight, dim):
                mine = [n for n in left if part.unit[n] >= 0]
                left -= set(mine)
                if mine:
                    found[name] = np.unique(part.unit[mine])
    if left:
        reason = groups.frozen.get(layer, "its weight is shared with another layer")
        raise ValueError(f"remove: outputs {sorted(left)} of {layer!r} must stay: {reason}")
    return found
