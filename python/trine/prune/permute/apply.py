"""Permuting channels through a whole network: those who make them and those who read them alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from trine.nn.packed import is_conv1d
from trine.prune.layers import check_finite, prunable_layers
from trine.prune.permute.search import kept_magnitude, search_permutation
from trine.prune.structured.groups import Group, Slice

__all__ = ["KeptMagnitude", "attention_values", "linked_channels", "permute_for_24"]


@dataclass(frozen=True)
class KeptMagnitude:
    """The share of sum |w| of a group's readers that 2:4 keeps, in the old and the new order."""

    before: float
    after: float


def permute_for_24(
    model: nn.Module,
    groups: Mapping[str, Group] | Iterable[Group],
    layers: str | Iterable[str] = "*",
    *,
    skip: str | Iterable[str] = (),
    escapes: int = 16,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[nn.Module, dict[str, KeptMagnitude]]:
    """A copy of `model` that computes the same, whose channels stand where 2:4 keeps more of them.

    Prune the copy to 2:4 afterwards, in whatever way (Pool & Yu 2021, NeurIPS). For every group of
    channels an order is searched in which the layers that read them keep most magnitude
    (`search_permutation`); all parameters that hold the channels are permuted alike: the layers
    that make them, norms and depthwise convolutions in between, all readers.

        groups = trine.prune.structured.trace(model, example_inputs)
        model, kept = permute_for_24(model, groups)

    Args:
        model: any module; it is not touched.
        groups: which channels belong together: all that `trine.prune.structured.trace` found, some
            of it, or made by hand with `linked_channels` and `attention_values`.
        layers, skip: patterns of names, see `prunable_layers`: the layers that will be 2:4. Only
            linear layers and convolutions of 1 x 1 count in the search: in larger windows the four
            of 2:4 are places of one channel.
        escapes, seed: of the search.
        progress: called with the number of groups that are done.

    Returns:
        The copy, and for each group whose order was searched what 2:4 keeps before and after.
        Groups that no such layer reads in whole runs of four channels are left as they are.

    Raises:
        ValueError: no group is read by a chosen layer, a group that does not fit the model, NaN.
    """
    from trine.compress.layers import copy_model

    chosen = prunable_layers(model, layers, skip)
    for name, layer in chosen.items():
        check_finite(name, layer)
    named = dict(groups) if isinstance(groups, Mapping) else {g.name: g for g in groups}
    matrices = {}
    for name, group in named.items():
        _check_fits(model, group)
        if parts := list(_read_by(model, group, chosen)):
            matrices[name] = torch.cat(parts)
    if not matrices:
        raise ValueError(
            "permute_for_24: no chosen layer reads any of the groups in runs of four channels; "
            "check layers and skip"
        )
    permuted = copy_model(model, {})
    kept = {}
    for done, (name, matrix) in enumerate(matrices.items(), start=1):
        order = search_permutation(matrix, escapes=escapes, seed=seed)
        _permute(permuted, named[name], order.numpy())
        kept[name] = KeptMagnitude(kept_magnitude(matrix), kept_magnitude(matrix[:, order]))
        progress(done)
    return permuted, kept


def linked_channels(
    model: nn.Module, made_by: Iterable[str], read_by: Iterable[str], through: Iterable[str] = ()
) -> Group:
    """A group by hand: every output channel of some layers is the same input of others.

    Args:
        made_by: layers whose outputs the channels are; all are permuted alike, as a gate and what
            it is multiplied with.
        read_by: layers whose inputs they are.
        through: norms, depthwise convolutions and PReLUs between: all their vectors are permuted.

    Raises:
        ValueError: a layer that there is not, or of another kind or width.
    """
    made, read = list(made_by), list(read_by)
    slices = [
        part for name in made for part in _of_outputs(model, name, np.arange(_width(model, name)))
    ]
    size = len(slices[0].unit) if slices else 0
    slices += [_of_inputs(model, name, np.arange(size)) for name in read]
    for name in through:
        module = _module(model, name)
        tensors = (*module.named_parameters(), *module.named_buffers())
        slices += [
            Slice(f"{name}.{key}", 0, np.arange(size)) for key, tensor in tensors if tensor.dim()
        ]
    group = _group(made, read, size, slices)
    _check_fits(model, group)
    return group


def attention_values(
    model: nn.Module,
    value: str,
    output: str,
    heads: int,
    *,
    kv_heads: int | None = None,
    first: int = 0,
) -> list[Group]:
    """The channels between an attention's value projection and its output projection, head by head.

    Attention mixes rows and no channels, so those of each head may be permuted among themselves.

    Args:
        value: the layer that makes the values.
        output: the layer that reads the heads' outputs, one head after the other.
        heads: how many there are.
        kv_heads: how many there are of the values (grouped queries); as many by default.
        first: the first output of `value` that is a value, for fused projections (GPT-2's c_attn:
            two thirds of its outputs).

    Raises:
        ValueError: a layer that there is not, or widths that do not divide so.
    """
    kv_heads = kv_heads or heads
    read = _module(model, output)
    columns = read.weight.shape[_input_dim(output, read)]
    width, rest = divmod(columns, heads)
    if rest or heads % kv_heads or first + kv_heads * width > _width(model, value):
        raise ValueError(
            f"attention_values: '{output}' reads {columns} channels and '{value}' makes "
            f"{_width(model, value) - first}: not {heads} heads with {kv_heads} of values"
        )
    groups = []
    for head in range(kv_heads):
        made = np.full(_width(model, value), -1)
        made[first + head * width : first + (head + 1) * width] = np.arange(width)
        of_head = np.arange(columns) // width // (heads // kv_heads)
        reads = np.where(of_head == head, np.arange(columns) % width, -1)
        slices = [*_of_outputs(model, value, made), _of_inputs(model, output, reads)]
        groups.append(_group([f"{value}#{head}"], [output], width, slices))
    return groups


def _group(made: list[str], read: list[str], size: int, slices: list[Slice]) -> Group:
    if not made or not read:
        raise ValueError(
            "a group of channels needs a layer that makes them and one that reads them"
        )
    return Group(made[0], "neuron", size, 1, 0, tuple(made), tuple(slices))


def _of_outputs(model: nn.Module, name: str, unit: np.ndarray) -> Iterator[Slice]:
    module = _module(model, name)
    yield Slice(f"{name}.weight", 1 if is_conv1d(module) else 0, unit)
    if module.bias is not None:
        yield Slice(f"{name}.bias", 0, unit)


def _of_inputs(model: nn.Module, name: str, unit: np.ndarray) -> Slice:
    return Slice(f"{name}.weight", _input_dim(name, _module(model, name)), unit)


def _width(model: nn.Module, name: str) -> int:
    module = _module(model, name)
    _input_dim(name, module)  # raises for another kind
    return module.weight.shape[1 if is_conv1d(module) else 0]


def _input_dim(name: str, module: nn.Module) -> int:
    if is_conv1d(module):
        return 0
    if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
        return 1
    raise ValueError(f"layer '{name}' must be nn.Linear, nn.Conv2d without groups or Conv1D")


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the model has no layer '{name}'") from None


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, key = name.rpartition(".")
    return getattr(_module(model, owner), key)


def _check_fits(model: nn.Module, group: Group) -> None:
    for part in group.slices:
        shape = list(_tensor(model, part.parameter).shape)
        if part.dim >= len(shape) or shape[part.dim] != len(part.unit):
            raise ValueError(
                f"group '{group.name}' holds {len(part.unit)} positions of dimension {part.dim} of "
                f"'{part.parameter}', whose shape is {shape}"
            )


def _read_by(model: nn.Module, group: Group, chosen: Mapping[str, nn.Module]) -> Iterator[Tensor]:
    """The weights of the chosen readers as matrices [R, units]: what 2:4 will look at."""
    for part in group.slices:
        owner, _, key = part.parameter.rpartition(".")
        layer = chosen.get(owner)
        if layer is None or key != "weight" or layer.weight[0, 0].numel() > 1:
            continue
        if part.dim != (0 if is_conv1d(layer) else 1):
            continue
        rows = layer.weight.detach().movedim(part.dim, -1).reshape(-1, len(part.unit))
        for places in _occurrences(part.unit, group.size):
            aligned = places[0] % 4 == 0 and (np.diff(places) == 1).all()
            if aligned:
                yield rows[:, torch.from_numpy(places)]


def _occurrences(unit: np.ndarray, size: int) -> np.ndarray:
    """[times, size]: the places of every unit, first its first ones, then its second, ..."""
    places = np.argsort(unit, kind="stable")[(unit < 0).sum() :]
    return places.reshape(size, -1).T


def _permute(model: nn.Module, group: Group, order: np.ndarray) -> None:
    with torch.no_grad():
        for part in group.slices:
            tensor = _tensor(model, part.parameter)
            source = np.arange(len(part.unit))
            for places in _occurrences(part.unit, group.size):
                source[places] = places[order]
            index = torch.from_numpy(source).to(tensor.device)
            tensor.copy_(tensor.index_select(part.dim, index))
