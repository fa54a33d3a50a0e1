"""Rules of convolutions, norms, pooling and attention."""

from __future__ import annotations

from torch import Tensor

from trine.prune.structured.labels import Block, Label, fixed, join, keep_size, moved
from trine.prune.structured.rules.arithmetic import contract, tag_heads
from trine.prune.structured.rules.shapes import grown
from trine.prune.structured.rules.table import NoRule, Step, rule
from trine.prune.structured.units import Ids


@rule("convolution", "_convolution")
def _convolution(step: Step) -> list[Label]:
    x, weight, bias = (step.args[i] for i in range(3))
    transposed, groups = step.args[6], step.args[8]
    if x.ndim != weight.ndim:
        raise NoRule  # without a batch dimension
    step.keep_sizes(step.label(x), range(2, x.ndim), "convolved")
    step.keep_sizes(step.label(weight), range(2, weight.ndim), "its kernel")
    outer, inner = (1, 0) if transposed else (0, 1)
    channels, taps = _ids(step, x, 1), _ids(step, weight, inner)
    filters = _ids(step, weight, outer)
    if groups == 1:
        _meet(step, channels, taps, "the convolution's input channels")
        return [_channels(step, x, filters, bias)]
    if transposed:
        raise NoRule
    # Whole groups go: inside a group every filter reads every channel.
    _keep(step, taps, "channels inside a group")
    if channels is not None:
        channels = step.units.join_along(channels.reshape(groups, -1), 1)
    if filters is not None:
        by_group = step.units.join_along(filters.reshape(groups, -1), 1)
        _meet(step, channels, by_group, "the groups of a convolution")
    return [_channels(step, x, filters, bias)]


def _channels(step: Step, x: Tensor, ids: Ids | None, bias: Tensor | None) -> Label:
    """[N, C, ...] with N as in x, these channels, and the bias added."""
    batch = step.label(x).block_of(0)
    if batch is not None:
        step.keep_sizes(step.label(x), [0], "the batch")
    blocks = () if ids is None else (Block((1,), ids),)
    label = Label(tuple(step.out.shape), blocks)
    if bias is not None:
        label = join([label, _per_channel(step, bias, step.out.ndim)], step.units, "")
    return label


def _ids(step: Step, x: Tensor, dim: int) -> Ids | None:
    """Units of a dimension, of whose block no other dimension is left."""
    label = step.label(x)
    block = label.block_of(dim)
    if block is not None and len(block.dims) > 1:
        for other in block.dims:
            if other != dim:
                label = keep_size(label, other, step.units, "")
        block = label.block_of(dim)
    return None if block is None else block.ids


def _meet(step: Step, one: Ids | None, other: Ids | None, what: str) -> None:
    if one is not None and other is not None:
        step.units.union(one, other)
    else:
        _keep(step, one, f"{what} have a fixed number")
        _keep(step, other, f"{what} have a fixed number")


def _keep(step: Step, ids: Ids | None, text: str) -> None:
    if ids is not None:
        step.units.freeze(ids, step.reason(text))


def _per_channel(step: Step, vector: Tensor, ndim: int) -> Label:
    shape = [1] * ndim
    shape[1] = vector.shape[0]
    return moved(step.label(vector), [1], shape)


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update",
)  # fmt: skip
def _batch_norm(step: Step) -> list[Label]:
    x = step.args[0]
    vectors = [v for v in step.args[1:5] if isinstance(v, Tensor)]
    labels = [step.label(x), *(_per_channel(step, v, x.ndim) for v in vectors)]
    return [join(labels, step.units, step.reason("batch norm"))]


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def _layer_norm(step: Step) -> list[Label]:
    """Its statistics are over what would shrink: those units go only where asked for."""
    label = step.label(step.args[0])
    parameters = [p for p in step.args[2:4] if isinstance(p, Tensor)]
    for dim in range(len(label.shape) - len(step.args[1]), len(label.shape)):
        block = label.block_of(dim)
        if block is None:
            continue
        if len(block.dims) > 1 or not parameters:
            label = step.keep_sizes(label, [dim], "a norm that holds its size as a number")
        else:
            step.units.tag(block.ids, "statistic")
    return [join([label, *map(step.label, parameters)], step.units, step.reason("norm"))]


@rule("native_group_norm")
def _group_norm(step: Step) -> list[Label]:
    """Whole groups go; then the statistics of the others stay what they were."""
    x, weight, bias, groups = step.args[0], step.args[1], step.args[2], step.args[6]
    label = step.keep_sizes(step.label(x), range(2, x.ndim), "group norm")
    ids = _ids(step, x, 1)
    if ids is not None:
        step.units.join_along(ids.reshape(groups, -1), 1)
        if weight is None:
            _keep(step, ids, "a norm that holds its size as a number")
    vectors = [_per_channel(step, v, x.ndim) for v in (weight, bias) if v is not None]
    return [join([label, *vectors], step.units, step.reason("group norm"))]


@rule(
    "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_max_pool2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d",
    "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
    "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d",
)  # fmt: skip
def _pooling(step: Step) -> list[Label]:
    """Every channel alone, over the places."""
    x = step.args[0]
    out = step.out[0] if isinstance(step.out, tuple) else step.out
    first = {"1": 1, "2": 2, "3": 3}.get(next((c for c in step.name if c in "123"), "2"), 2)
    label = step.keep_sizes(step.label(x), range(x.ndim - first, x.ndim), "pooled")
    return [Label(tuple(out.shape), label.blocks)]


@rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def _attention(step: Step) -> list[Label]:
    """softmax(q k^T + mask) v: two products, as they would be alone. q [B, H, T, D]."""
    query, key, value = (step.label(step.args[i]) for i in range(3))
    (b, h, t, d), (_, _, s, e) = query.shape, value.shape
    key, value = _every_head(step, key, h), _every_head(step, value, h)
    query = moved(query, [0, 1, 2, 4], (b, h, t, 1, d))
    key = moved(key, [0, 1, 3, 4], (b, h, 1, s, d))
    scores = contract(step, join([query, key], step.units, step.reason("attention")), 4)
    mask = step.kwargs.get("attn_mask", step.kwargs.get("attn_bias"))
    if mask is None and isinstance(step.argument(3, "attn_bias"), Tensor):
        mask = step.args[3]
    if mask is not None:
        scores = join([scores, step.label(mask)], step.units, step.reason("attention mask"))
    scores = step.keep_sizes(scores, [3], "softmax")
    scores = moved(scores, [0, 1, 2, 3], (*scores.shape, 1))
    value = moved(value, [0, 1, 3, 4], (b, h, 1, s, e))
    both = join([scores, value], step.units, step.reason("attention"))
    tag_heads(step, both, [1])
    out = contract(step, both, 3)
    return [Label(tuple(step.out[0].shape), out.blocks)]


def _every_head(step: Step, label: Label, heads: int) -> Label:
    """Keys or values [B, H, S, D] of fewer heads: each serves several queries, one by one."""
    block, shape = label.block_of(1), (label.shape[0], heads, *label.shape[2:])
    if label.shape[1] == 1:
        return grown(step, label, shape)
    if block is None or label.shape[1] == heads:
        return Label(shape, label.blocks)
    ids = block.ids.repeat(heads // label.shape[1], block.dims.index(1))
    others = tuple(other for other in label.blocks if other is not block)
    return Label(shape, (*others, Block(block.dims, ids)))


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def _shuffle(step: Step) -> list[Label]:
    step.keep_sizes(step.label(step.args[0]), [1], "channels are rearranged")
    return [fixed(step.out.shape)]
