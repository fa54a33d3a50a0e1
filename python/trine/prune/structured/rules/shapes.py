"""Rules of the operators that move, cut and join tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from trine.prune.structured.labels import (
    Block,
    Label,
    fixed,
    freeze,
    fresh,
    join,
    moved,
    reshape,
)
from trine.prune.structured.rules.table import NoRule, Step, rule
from trine.prune.structured.units import Ids

_CUT = "it is cut into parts that are not equally large"


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy")
def _view(step: Step) -> list[Label]:
    x = step.args[0]
    if x.numel() != step.out.numel():
        raise NoRule
    return [reshape(step.label(x), step.out.shape, step.units, step.reason("reshaped"))]


@rule("permute")
def _permute(step: Step) -> list[Label]:
    order = [dim % step.out.ndim for dim in step.args[1]]
    places = [order.index(dim) for dim in range(len(order))]
    return [moved(step.label(step.args[0]), places, step.out.shape)]


@rule("transpose", "t", "swapaxes")
def _transpose(step: Step) -> list[Label]:
    places = list(range(step.out.ndim))
    one, other = step.args[1:3] if len(step.args) > 1 else (0, -1)
    if places:
        places[one], places[other] = places[other], places[one]
    return [moved(step.label(step.args[0]), places, step.out.shape)]


@rule("expand")
def _expand(step: Step) -> list[Label]:
    return [grown(step, step.label(step.args[0]), step.out.shape)]


def grown(step: Step, label: Label, shape: Sequence[int]) -> Label:
    """Expanded to that shape. The new positions are all alike, so their number may change, but it
    is the same for all that use the result."""
    new = len(shape) - len(label.shape)
    old = moved(label, [dim + new for dim in range(len(label.shape))], shape)
    same = (1,) * new + label.shape
    dims = [dim for dim, size in enumerate(shape) if size > 1 and same[dim] == 1]
    added = tuple(Block((dim,), step.units.new(shape[dim])) for dim in dims)
    return Label(old.shape, old.blocks + added)


@rule("unsqueeze")
def _unsqueeze(step: Step) -> list[Label]:
    dim = step.args[1] % step.out.ndim
    label = step.label(step.args[0])
    return [moved(label, [d + (d >= dim) for d in range(len(label.shape))], step.out.shape)]


@rule("squeeze")
def _squeeze(step: Step) -> list[Label]:
    label = step.label(step.args[0])
    dims = step.argument(1, "dim", range(len(label.shape)))
    dims = [dims] if isinstance(dims, int) else dims
    gone = {dim % len(label.shape) for dim in dims}
    gone = {dim for dim in gone if label.shape[dim] == 1}
    places, place = [], 0
    for dim in range(len(label.shape)):
        places.append(None if dim in gone else place)
        place += dim not in gone
    return [moved(label, places, step.out.shape)]


@rule("select")
def _select(step: Step) -> list[Label]:
    dim = step.args[1]
    label = step.keep_sizes(step.label(step.args[0]), [dim], "one position is selected")
    return [_without(label, dim % len(label.shape), step.out.shape)]


@rule("unbind")
def _unbind(step: Step) -> list[Label]:
    dim = step.argument(1, "dim", 0)
    label = step.keep_sizes(step.label(step.args[0]), [dim], "every position is taken alone")
    return [_without(label, dim % len(label.shape), part.shape) for part in step.out]


def _without(label: Label, dim: int, shape: Sequence[int]) -> Label:
    places = [None if d == dim else d - (d > dim) for d in range(len(label.shape))]
    return moved(label, places, shape)


@rule("slice", "narrow")
def _slice(step: Step) -> list[Label]:
    x = step.args[0]
    dim = step.argument(1, "dim", 0) % x.ndim
    start = step.argument(2, "start", 0) or 0
    start = min(max(start + x.shape[dim] if start < 0 else start, 0), x.shape[dim])
    if step.out.shape[dim] == x.shape[dim]:
        return [step.label(x)]
    return _parts(step, dim, [(start, step.out.shape[dim])], step.argument(4, "step", 1))


@rule("split", "split_with_sizes", "chunk")
def _split(step: Step) -> list[Label]:
    dim = step.argument(2, "dim", 0) % step.args[0].ndim
    lengths = [part.shape[dim] for part in step.out]
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    return _parts(step, dim, list(zip(starts, lengths, strict=True)), 1)


@rule("glu")
def _glu(step: Step) -> list[Label]:
    dim = step.argument(1, "dim", -1) % step.out.ndim
    return _parts(step, dim, [(0, step.out.shape[dim])], 1)


def _parts(step: Step, dim: int, spans: list[tuple[int, int]], stride: int) -> list[Label]:
    """Labels of spans (start, length) of a dimension.

    Equal parts stay equal if each loses the same positions; nothing else would keep the model's
    own sizes of the parts right.
    """
    label = step.label(step.args[0])
    block = label.block_of(dim)
    size, length = label.shape[dim], spans[0][1]
    equal = stride == 1 and length > 1 and size % length == 0
    equal = equal and all(start % length == 0 and n == length for start, n in spans)
    if block is not None and (len(block.dims) > 1 or not equal):
        label = step.keep_sizes(label, [dim], _CUT)
        block = None
    if block is not None:
        step.units.join_along(block.ids.reshape(-1, length), 0)
    parts = []
    for start, n in spans:
        shape = (*label.shape[:dim], n, *label.shape[dim + 1 :])
        blocks = tuple(
            Block(other.dims, other.ids[start : start + n]) if other is block else other
            for other in label.blocks
        )
        parts.append(Label(shape, blocks))
    return parts


@rule("cat")
def _cat(step: Step) -> list[Label]:
    tensors = [x for x in step.args[0] if x.shape != (0,)]  # an empty cache, which cat leaves out
    dim = step.argument(1, "dim", 0) % step.out.ndim
    labels = [_alone(step, step.label(x), dim) for x in tensors]
    others = [
        Label(
            (*label.shape[:dim], 1, *label.shape[dim + 1 :]),
            tuple(block for block in label.blocks if dim not in block.dims),
        )
        for label in labels
    ]
    blocks = join(others, step.units, step.reason("concatenated")).blocks
    if any(label.block_of(dim) for label in labels):
        parts = [_or_kept(step, label.block_of(dim), label.shape[dim]) for label in labels]
        blocks += (Block((dim,), np.concatenate(parts)),)
    return [Label(tuple(step.out.shape), blocks)]


def _alone(step: Step, label: Label, dim: int) -> Label:
    """The label, in which the dimension is fixed or a block of its own."""
    block = label.block_of(dim)
    if block is not None and len(block.dims) > 1:
        label = step.keep_sizes(label, [dim], "concatenated")
    return label


def _or_kept(step: Step, block: Block | None, size: int) -> Ids:
    """The units of a block; new ones, which must stay, for a part with none."""
    if block is not None:
        return block.ids
    ids = step.units.new(size)
    step.units.freeze(ids, step.reason("concatenated with what has a fixed size"))
    return ids


@rule("stack")
def _stack(step: Step) -> list[Label]:
    dim = step.argument(1, "dim", 0) % step.out.ndim
    label = join([step.label(x) for x in step.args[0]], step.units, step.reason("stacked"))
    places = [d + (d >= dim) for d in range(len(label.shape))]
    return [moved(label, places, step.out.shape)]


@rule("repeat")
def _repeat(step: Step) -> list[Label]:
    label, times = step.label(step.args[0]), step.args[1]
    new = len(times) - len(label.shape)
    blocks = [
        Block(
            tuple(dim + new for dim in block.dims),
            np.tile(block.ids, [times[dim + new] for dim in block.dims]),
        )
        for block in label.blocks
    ]
    once = (1,) * new + label.shape
    added = (dim for dim, n in enumerate(step.out.shape) if n > 1 and once[dim] == 1)
    blocks += [Block((dim,), step.units.new(step.out.shape[dim])) for dim in added]
    return [Label(tuple(step.out.shape), tuple(blocks))]


@rule("constant_pad_nd")
def _pad(step: Step) -> list[Label]:
    x, pad = step.args[0], step.args[1]
    label = step.label(x)
    blocks, changed = [], set()
    for block in label.blocks:
        for axis, dim in enumerate(block.dims):
            place = 2 * (x.ndim - 1 - dim)
            before, after = (pad[place], pad[place + 1]) if place < len(pad) else (0, 0)
            if not before and not after:
                continue
            if len(block.dims) > 1 or min(before, after) < 0:
                raise NoRule
            changed.add(dim)
            ends = [_or_kept(step, None, before), block.ids, _or_kept(step, None, after)]
            block = Block(block.dims, np.concatenate(ends, axis))
        blocks.append(block)
    return [Label(tuple(step.out.shape), tuple(blocks))]


@rule("flip", "roll", "index_select", "cumsum", "cumprod", "_softmax", "_log_softmax")
def _along(step: Step) -> list[Label]:
    """All positions along some dimensions are read together, or picked by number."""
    place = 2 if step.name == "roll" else 1
    dims = step.argument(place, "dims" if step.name in ("flip", "roll") else "dim")
    dims = [dims] if isinstance(dims, int) else dims
    label = step.keep_sizes(step.label(step.args[0]), dims, "over a dimension that would shrink")
    return [Label(tuple(step.out.shape), label.blocks)]


@rule("index")
def _index(step: Step) -> list[Label]:
    x, indices = step.args[0], step.args[1]
    used = [dim for dim, index in enumerate(indices) if index is not None]
    if used != list(range(used[0], used[-1] + 1)) or any(
        indices[dim].dtype.is_floating_point or str(indices[dim].dtype) == "torch.bool"
        for dim in used
    ):
        raise NoRule
    label = step.keep_sizes(step.label(x), used, "positions are picked by number")
    more = step.out.ndim - x.ndim
    places = [
        dim if dim < used[0] else dim + more if dim > used[-1] else None for dim in range(x.ndim)
    ]
    return [moved(label, places, step.out.shape)]


@rule("embedding")
def _embedding(step: Step) -> list[Label]:
    label = step.keep_sizes(step.label(step.args[0]), [0], "a table that is looked up by number")
    block = label.block_of(1)
    last = step.out.ndim - 1
    return [Label(tuple(step.out.shape), () if block is None else (Block((last,), block.ids),))]


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
def _uniform(step: Step) -> list[Label]:
    """The same everywhere, so that only its sizes need to follow; running the model shows that."""
    return [fresh(step.out.shape, step.units)]


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
def _like(step: Step) -> list[Label]:
    return [step.label(step.args[0])]


@rule("gather")
def _gather(step: Step) -> list[Label]:
    for x in (step.args[0], step.args[2]):
        freeze(step.label(x), step.units, step.reason("positions are picked by number"))
    return [fixed(step.out.shape)]


@rule("arange", "lift_fresh", "scalar_tensor", "_local_scalar_dense")
def _constant(step: Step) -> list[Label]:
    if isinstance(step.out, Tensor) and step.args and isinstance(step.args[0], Tensor):
        return [step.label(step.args[0])]
    if not isinstance(step.out, Tensor):
        for x in step.args:
            if isinstance(x, Tensor):
                freeze(step.label(x), step.units, step.reason("read as a number"))
        return []
    return [fixed(step.out.shape)]
