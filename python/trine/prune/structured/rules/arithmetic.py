"""Rules of elementwise operators, products and reductions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from trine.prune.structured.labels import Label, join, keep_size, moved
from trine.prune.structured.rules.table import Step, rule
from trine.prune.structured.units import Ids


@rule(
    "add", "clone", "copy", "alias", "detach", "_to_copy", "contiguous", "masked_fill", "where",
    "dropout", "native_dropout", "tril", "triu", "lerp", "bernoulli", "fill", "zero",
    # Elementwise too, but without torch's tag for that:
    "hardswish", "_prelu_kernel", "log_sigmoid_forward", "rsub", "floor_divide",
)  # fmt: skip
def _elementwise(step: Step) -> list[Label]:
    tensors = [x for x in (*step.args, *step.kwargs.values()) if isinstance(x, Tensor)]
    joined = join([step.label(x) for x in tensors], step.units, step.reason("elementwise"))
    return [joined, joined] if isinstance(step.out, tuple) else [joined]


@rule("mm", "bmm", "mv", "matmul")
def _product(step: Step) -> list[Label]:
    return [product(step, step.args[0], step.args[1])]


@rule("addmm", "baddbmm")
def _add_product(step: Step) -> list[Label]:
    label = product(step, step.args[1], step.args[2])
    return [join([step.label(step.args[0]), label], step.units, step.reason("added"))]


@rule("linear")
def _linear(step: Step) -> list[Label]:
    x, weight = step.label(step.args[0]), step.label(step.args[1])
    turned = moved(weight, [1, 0], weight.shape[::-1])
    label = product_of(step, x, turned)
    bias = step.argument(2, "bias")
    if bias is not None:
        label = join([label, step.label(bias)], step.units, step.reason("bias"))
    return [label]


def product(step: Step, a: Tensor, b: Tensor) -> Label:
    """[..., M, K] x [..., K, N] or [K]."""
    return product_of(step, step.label(a), step.label(b))


def product_of(step: Step, a: Label, b: Label) -> Label:
    """A product is an elementwise one over [..., M, K, N], summed over K."""
    if len(b.shape) == 1:
        return contract(step, join([a, b], step.units, step.reason("product")), len(a.shape) - 1)
    rank = len(a.shape)
    a = moved(a, list(range(rank)), (*a.shape, 1))
    places = [*range(len(b.shape) - 2), len(b.shape) - 1, len(b.shape)]
    b = moved(b, places, (*b.shape[:-2], 1, *b.shape[-2:]))
    both = join([a, b], step.units, step.reason("product"))
    tag_heads(step, both, range(len(both.shape) - 3))
    return contract(step, both, len(both.shape) - 2)


def tag_heads(step: Step, label: Label, batch: Sequence[int]) -> None:
    """Many small products at once, one for each position: that is what heads are."""
    for block in label.blocks:
        if set(block.dims) & set(batch):
            step.units.tag(block.ids, "head")


def contract(step: Step, label: Label, dim: int) -> Label:
    """Sum over a dimension, whose removed positions are those that would have added nothing."""
    block = label.block_of(dim)
    if block is not None and len(block.dims) > 1:
        # Queries times keys: all columns of a head are needed, so heads go as a whole.
        label = keep_size(label, dim, step.units, "")
    return _drop(label, [dim])


def _drop(label: Label, dims: Sequence[int], keep: bool = False) -> Label:
    blocks = tuple(block for block in label.blocks if not set(block.dims) & set(dims))
    shape = tuple(1 if dim in dims else n for dim, n in enumerate(label.shape))
    thin = Label(shape, blocks)
    if keep:
        return thin
    places, place = [], 0
    for dim in range(len(shape)):
        places.append(None if dim in dims else place)
        place += dim not in dims
    return moved(thin, places, [n for dim, n in enumerate(shape) if dim not in dims])


@rule("sum", "mean", "var", "std", "var_mean", "linalg_vector_norm", "norm")
def _statistic(step: Step) -> list[Label]:
    """Over a dimension that shrinks its value changes: those units go only where asked for."""
    out = step.out[0] if isinstance(step.out, tuple) else step.out
    label, dims = _reduced(step)
    for dim in dims:
        block = label.block_of(dim)
        if block is not None and len(block.dims) > 1:
            label = keep_size(label, dim, step.units, "")
        elif block is not None:
            step.when_read.append(partial(_changes, step, block.ids))
    return [_drop(label, dims, keep=out.ndim == len(label.shape))] * 2


def _changes(step: Step, ids: Ids) -> None:
    if set(step.units.roots(ids).tolist()) & step.units.tagged("head"):
        step.units.freeze(ids, step.reason("over all heads, whose number is part of the result"))
    step.units.tag(ids, "statistic")


@rule("amax", "amin", "max", "min", "argmax", "argmin", "logsumexp", "prod", "all", "any")
def _selecting(step: Step) -> list[Label]:
    out = step.out[0] if isinstance(step.out, tuple) else step.out
    others = [x for x in step.args[1:] if isinstance(x, Tensor)]
    if others:  # max(x, y) is elementwise
        return _elementwise(step)
    label, dims = _reduced(step)
    label = step.keep_sizes(label, dims, "over a dimension that would shrink")
    return [_drop(label, dims, keep=out.ndim == len(label.shape))] * 2


def _reduced(step: Step) -> tuple[Label, list[int]]:
    """The input's label, and the dimensions over which the operator goes."""
    label = step.label(step.args[0])
    place = 2 if step.name in ("linalg_vector_norm", "norm") else 1
    dims = step.argument(place, "dim")
    if dims is None or (not isinstance(dims, int) and not len(dims)):
        dims = range(len(label.shape))
    dims = [dims] if isinstance(dims, int) else dims
    return label, [dim % len(label.shape) for dim in dims] if label.shape else []
