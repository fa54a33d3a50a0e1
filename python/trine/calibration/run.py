"""Statistics of the inputs of a model's layers: in one pass over the data, or layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trine.calibration import probe as _probe
from trine.calibration.columns import is_calibrated, row_chunks, without_padding
from trine.calibration.statistics import Statistic

S = TypeVar("S", bound=Statistic)


class _Enough(Exception):
    """Ends a forward pass when the layer that it was for has been reached."""


def calibrate(
    model: nn.Module,
    data: Any,
    statistic: Callable[[], S],
    *,
    layers: Iterable[str] | None = None,
    batches: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, S]:
    """A statistic of the input of each layer, over all of `data`, by the layer's name.

        norms = trine.calibrate(model, loader, trine.calibration.ColumnNorm, batches=16)
        norms["encoder.0.query"].norm  # ||x_j||_2 of every column

    The model is run in evaluation mode and without gradients, on a copy that shares its parameters:
    its modes, hooks, buffers and the random state stay as they are. Rows stream into the
    statistics; no activation is kept. Rows that are padding (`attention_mask` of the batch is 0) do
    not count in layers whose input is [B, T, K] as the mask is [B, T].

    Args:
        model: any module.
        data: a batch, or an iterable of them, such as a DataLoader. A batch is a tensor (the only
            argument), a tuple or list (positional arguments), or a mapping (keyword arguments, as
            tokenizers give). A list is one of batches.
        statistic: makes an empty statistic, once for each layer: `ColumnNorm`, `ColumnMean`,
            `ColumnRange`, `SecondMoment`, or anything with `update(rows)`; `rows` are [M, K] as
            `trine.calibration.layer_rows` gives them.
        layers: names of nn.Linear, nn.Conv2d, the Conv1D of transformers or packed layers. All that
            there are by default, but for those that nn.MultiheadAttention reads without a call.
        batches: how many batches are read at the most; all by default.
        progress: called after each batch with the number that are done.

    Raises:
        ValueError: no such layer, no data, a batch that the model cannot be called with, a layer
            that no data reached, NaN or infinity in the input of a layer; all say which. What the
            model raises comes through.
    """
    chosen = chosen_layers(model, layers, "calibrate")
    gathered = {name: statistic() for name in chosen}
    reached: set[str] = set()
    with _probe.probing(model) as probe:
        watch = _Watch(reached)
        for name in chosen:
            watch.add(probe, name, gathered[name])
        done = _run_all(probe, _batches(data, batches), watch, progress)
    _require_reached(chosen, reached, done)
    return gathered


def in_turn(
    model: nn.Module,
    data: Any,
    statistic: Callable[[], S],
    *,
    layers: Iterable[str] | None = None,
    batches: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[str, nn.Module, S]]:
    """(name, layer, statistic) for each layer in the order in which the model calls them.

    The statistic of a layer is gathered when the layers before it have been handed out, so a caller
    that changes the weight of each layer in place (of a model that is the caller's own copy) has
    every later layer see the changed inputs, as SparseGPT and GPTQ do:

        for name, layer, moment in in_turn(small, loader, SecondMoment):
            layer.weight.data.copy_(...)

    Each layer takes a pass over the data, up to that layer; layers of the same input, such as
    query, key and value, share one. Batches are kept where `data` can be read only once. Arguments
    and errors as for `calibrate`; all but NaN are raised before the first layer. `progress` is
    called with the number of layers that are done.
    """
    chosen = chosen_layers(model, layers, "in_turn")
    kept = _batches(data, batches)
    if isinstance(data, Iterator):
        kept = list(kept)
    done = 0
    with _probe.probing(model) as probe:
        groups = _groups_of_one_input(probe, chosen, kept)
    for group, called_once in groups:
        gathered = {name: statistic() for name in group}
        with _probe.probing(model) as probe:
            watch = _Watch(set(), last=group[-1] if called_once else None)
            for name in group:
                watch.add(probe, name, gathered[name])
            read = _run_all(probe, kept, watch)
        _require_reached(group, watch.reached, read)
        for name in group:
            yield name, chosen[name], gathered[name]
            done += 1
            progress(done)


def chosen_layers(
    model: nn.Module, layers: Iterable[str] | None, caller: str
) -> dict[str, nn.Module]:
    """The layers of those names, or all that can be calibrated, by name."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"{caller} takes a torch.nn.Module; got {type(model).__name__}")
    if isinstance(layers, str):
        raise ValueError(f"{caller}: layers must be a list of names; got the string {layers!r}")
    modules = dict(model.named_modules())
    if layers is None:
        # The projection of nn.MultiheadAttention is never called.
        unread = nn.modules.linear.NonDynamicallyQuantizableLinear
        found = {
            name: module
            for name, module in modules.items()
            if is_calibrated(module) and not isinstance(module, unread)
        }
    else:
        names = list(layers)
        if missing := [name for name in names if name not in modules]:
            raise ValueError(f"{caller}: the model has no layer {missing[0]!r}")
        found = {name: modules[name] for name in names}
        for name, module in found.items():
            if not is_calibrated(module):
                raise ValueError(
                    f"{caller}: layer {name!r} is a {type(module).__name__}; it must be nn.Linear, "
                    "nn.Conv2d or the Conv1D of transformers"
                )
    if not found:
        raise ValueError(f"{caller}: there is no layer (nn.Linear, nn.Conv2d or Conv1D) to look at")
    return found


class _Watch:
    """Hooks that feed statistics, and what the batch at hand says about its rows."""

    def __init__(self, reached: set[str], last: str | None = None) -> None:
        self.reached, self.last = reached, last
        self.mask: Tensor | None = None

    def add(self, probe: nn.Module, name: str, statistic: Statistic) -> None:
        def look(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            for rows in row_chunks(layer, without_padding(layer, x, self.mask)):
                if rows.numel() == 0:
                    continue
                if not torch.isfinite(rows).all():
                    raise ValueError(
                        f"calibrate: the input of layer {name!r} holds NaN or infinity; repair the "
                        "data, or the weights of the layers before it"
                    )
                statistic.update(rows)
                self.reached.add(name)
            if name == self.last:
                raise _Enough

        probe.get_submodule(name).register_forward_pre_hook(look, with_kwargs=True)


def _run_all(
    probe: nn.Module,
    batches: Iterable[Any],
    watch: _Watch,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Runs every batch; returns how many there were. Raises ValueError where there is none."""
    done = 0
    for batch in batches:
        _probe.check_fits(probe, batch)
        watch.mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        with suppress(_Enough):
            _probe.run(probe, batch)
        done += 1
        progress(done)
    if not done:
        raise ValueError("calibrate: there is no data; give at least one batch")
    return done


def _batches(data: Any, most: int | None) -> Iterable[Any]:
    """The first `most` batches of `data`; what can be read again stays so."""
    if most is not None and most < 1:
        raise ValueError(f"calibrate: batches is {most}; it must be at least 1")
    if isinstance(data, Tensor | tuple | Mapping):
        return [data]
    if not isinstance(data, Iterable):
        raise ValueError(
            "calibrate: data must be a batch (a tensor, a tuple of arguments or a mapping of "
            f"keyword arguments) or an iterable of them; got {type(data).__name__}"
        )
    return data if most is None else _First(data, most)


class _First:
    """The first few of an iterable, each time that it is read."""

    def __init__(self, data: Iterable[Any], most: int) -> None:
        self.data, self.most = data, most

    def __iter__(self) -> Iterator[Any]:
        return islice(self.data, self.most)


def _require_reached(chosen: Iterable[str], reached: set[str], batches: int) -> None:
    if missed := [name for name in chosen if name not in reached]:
        raise ValueError(
            f"calibrate: none of the {batches} batches reached layer "
            f"{', '.join(map(repr, missed))}; give data that does, or leave it out with layers="
        )


def _groups_of_one_input(
    probe: nn.Module, chosen: Iterable[str], batches: Iterable[Any]
) -> list[tuple[list[str], bool]]:
    """The chosen layers in the order of their first calls; those of one input together.

    A layer joins the group before it only where both get the very same tensor, called one right
    after the other, in the first batch: then no changed layer lies between them. With each group
    whether one pass calls each of its layers once.
    """
    order: dict[str, int] = {}
    held: list[Tensor] = []  # the inputs, one for each group
    seen: set[str] = set()
    repeated: set[str] = set()

    def note(name: str):
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if x.numel() == 0:
                return
            if name in seen:
                repeated.add(name)
            seen.add(name)
            if name not in order:
                if not (held and held[-1] is x):
                    held.append(x)
                order[name] = len(held)

        return hook

    for name in chosen:
        probe.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True)
    done = 0
    for batch in batches:
        seen.clear()
        _probe.check_fits(probe, batch)
        _probe.run(probe, batch)
        held.append(torch.empty(0))  # a later batch starts a group of its own
        done += 1
        if len(order) == len(set(chosen)):
            break
    if not done:
        raise ValueError("calibrate: there is no data; give at least one batch")
    _require_reached(chosen, set(order), done)
    groups: dict[int, list[str]] = {}
    for name, group in order.items():
        groups.setdefault(group, []).append(name)
    return [(group, not repeated & set(group)) for group in groups.values()]
