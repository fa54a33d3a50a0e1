"""What each dimension of a tensor consists of, and how that goes through joins and reshapes.

A dimension of a tensor is *live* when it lies in a block: its positions are units, which might be
removed. Otherwise it is *fixed*, or of size 1 and so fits everything. A block spans one dimension,
or several whose units were one dimension before a reshape: the channels [H * D] of an attention
layer become a block [H, D], of which whole heads (or whole columns) can go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from trine.prune.structured.units import Ids, Units

Shape = Sequence[int]


@dataclass(frozen=True)
class Block:
    """Units of the dimensions `dims` (ascending) at once; ids has one axis for each of them."""

    dims: tuple[int, ...]
    ids: Ids


@dataclass(frozen=True)
class Label:
    """The dimensions of one tensor; sizes of 1 are in no block."""

    shape: tuple[int, ...]
    blocks: tuple[Block, ...] = ()

    def block_of(self, dim: int) -> Block | None:
        return next((block for block in self.blocks if dim in block.dims), None)

    def is_fixed(self, dim: int) -> bool:
        return self.shape[dim] > 1 and self.block_of(dim) is None

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)


def fixed(shape: Shape) -> Label:
    return Label(tuple(shape))


def fresh(shape: Shape, units: Units) -> Label:
    """Every dimension live, with units of its own."""
    return Label(
        tuple(shape),
        tuple(Block((dim,), units.new(size)) for dim, size in enumerate(shape) if size > 1),
    )


def moved(label: Label, places: Sequence[int | None], shape: Shape) -> Label:
    """Dimension d goes to places[d] of a tensor of that shape (None: it is dropped, of size 1)."""
    blocks = []
    for block in label.blocks:
        dims = [places[dim] for dim in block.dims]
        order = np.argsort(dims)
        blocks.append(Block(tuple(dims[i] for i in order), block.ids.transpose(order)))
    return Label(tuple(shape), tuple(blocks))


def keep_size(label: Label, dim: int, units: Units, reason: str) -> Label:
    """The label after an operation that needs all positions of `dim`."""
    block = label.block_of(dim)
    if block is None:
        return label
    rest = tuple(other for other in label.blocks if other is not block)
    if len(block.dims) == 1:
        units.freeze(block.ids, reason)
        return Label(label.shape, rest)
    axis = block.dims.index(dim)
    left = Block(block.dims[:axis] + block.dims[axis + 1 :], units.join_along(block.ids, axis))
    return Label(label.shape, (*rest, left))


def freeze(label: Label, units: Units, reason: str) -> None:
    for block in label.blocks:
        units.freeze(block.ids, reason)


def join(labels: Sequence[Label], units: Units, reason: str) -> Label:
    """The label of an elementwise result: what is at one position is removed together."""
    shape = np.broadcast_shapes(*(label.shape for label in labels))
    aligned = [_aligned(label, shape) for label in labels]
    blocks = [block for label in aligned for block in label.blocks]
    result = Label(shape)
    for block in sorted(blocks, key=lambda block: -len(block.dims)):
        result = _with_block(result, block, units, reason)
    for dim in range(len(shape)):
        if any(label.is_fixed(dim) for label in aligned):
            result = keep_size(result, dim, units, reason)
    return result


def _aligned(label: Label, shape: Shape) -> Label:
    offset = len(shape) - len(label.shape)
    full = (1,) * offset + label.shape
    return moved(label, [dim + offset for dim in range(len(label.shape))], full)


def _with_block(result: Label, block: Block, units: Units, reason: str) -> Label:
    touched = [other for other in result.blocks if set(other.dims) & set(block.dims)]
    if not touched:
        return Label(result.shape, (*result.blocks, block))
    first = touched[0]
    if len(touched) == 1 and first.dims[: len(block.dims)] == block.dims:
        # The same dimensions, or the outer ones: a head is removed with all of its columns.
        axes = tuple(range(len(block.dims), len(first.dims)))
        units.union(first.ids, np.expand_dims(block.ids, axes))
        return result
    # Only inner dimensions (one vector for all heads, say): these keep their size.
    units.freeze(block.ids, reason)
    for dim in block.dims:
        result = keep_size(result, dim, units, reason)
    return result


def reshape(label: Label, shape: Shape, units: Units, reason: str) -> Label:
    """The label of the same elements in another shape."""
    shape = tuple(shape)
    if prod(shape) == 0:
        freeze(label, units, reason)
        return fixed(shape)
    segments = _segments(label.shape, shape)
    blocks: list[Block] = []
    used: set[int] = set()
    for block in sorted(label.blocks, key=lambda block: block.dims):
        mine = [n for n, (before, _) in enumerate(segments) if set(before) & set(block.dims)]
        if used & set(mine):  # a product with another block: the inner one keeps its size
            units.freeze(block.ids, reason)
            continue
        used |= set(mine)
        before = [dim for n in mine for dim in segments[n][0]]
        after = [dim for n in mine for dim in segments[n][1]]
        axes = tuple(i for i, dim in enumerate(before) if dim not in block.dims)
        full = np.broadcast_to(
            np.expand_dims(block.ids, axes), [label.shape[dim] for dim in before]
        ).reshape([shape[dim] for dim in after])
        blocks.append(_without_constant_axes(Block(tuple(after), full)))
    blocks = [block for block in blocks if block.dims]
    for block in blocks:
        if len(block.dims) > 1:
            units.rectangle(block.ids)
    return Label(shape, tuple(blocks))


def _without_constant_axes(block: Block) -> Block:
    """Axes along which nothing changes can lose no position alone: they are not live."""
    dims, ids = [], block.ids
    for dim in block.dims:
        axis = len(dims)
        if (ids == ids.take([0], axis)).all():
            ids = ids.take(0, axis)
        else:
            dims.append(dim)
    return Block(tuple(dims), ids)


def _segments(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """The least runs of dimensions with equal numbers of elements, of both shapes."""
    runs, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        mine = [i] if i < len(before) else []
        theirs = [j] if j < len(after) else []
        i, j = i + len(mine), j + len(theirs)
        while prod(before[d] for d in mine) != prod(after[d] for d in theirs):
            if prod(before[d] for d in mine) < prod(after[d] for d in theirs):
                mine.append(i)
                i += 1
            else:
                theirs.append(j)
                j += 1
        runs.append((mine, theirs))
    return runs
