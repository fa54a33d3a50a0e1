"""How a dense weight becomes few levels: the rules that packing and training share.

Everything is computed in fp32 after widening, with one rounding at each step, so that training and
packing see the same codes.
"""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from trine._bits import only
from trine.ops import quantize_rows
from trine.ops._linear import scaled_by_groups
from trine.ops.quantize_rows import reference
from trine.quantize.groups import split_group


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` without the sums, on every device: q int8 [M, K] and scale float32 [M]."""
    rows = quantize_rows if x.is_cpu else reference.quantize_rows  # equal bits; one runs anywhere
    q, scale, _ = rows(x)
    return q, scale


def int8_absmax(weight: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantise each row of `weight` [N, K], or each group, to int8 by its largest magnitude.

    scale = absmax / 127, codes = rint(w * (127 / absmax)) (half to even) in [-127, 127], the rule
    of `trine.ops.quantize_rows`: a row of zeros gets codes 0 and scale 0, so that it yields exactly
    0; a row with NaN or infinity gets scale NaN.

    Args:
        group: so many consecutive columns of a row have a scale of their own; it divides K.

    Returns codes int8 [N, K] and scale float32 [N], with groups [N, K / group].
    """
    if group is None:
        return int8_rows(weight)
    codes, scale = int8_rows(weight.reshape(-1, group))
    return codes.reshape(weight.shape), scale.reshape(len(weight), -1)


def ternary_absmean(weight: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantise `weight` [N, K] to {-1, 0, 1} by its mean magnitude, or by that of each group.

    The rule of BitNet b1.58 (arXiv:2402.17764): scale = mean |w|, codes = clamp(rint(w / scale),
    -1, 1). The mean is summed in float64, so that the number of threads does not show in it. A
    weight of zeros gets codes 0 and scale 0.

    Args:
        group: so many consecutive columns of a row have a scale of their own; it divides K.

    Returns codes int8 [N, K] and scale float32 [1], with groups [N, K / group].
    """
    blocks = _blocks(weight, group)
    scale = _mean(blocks.abs()).float()
    steps = torch.where(scale > 0, blocks / scale, 0.0)
    codes = steps.round().clamp(-1, 1).to(torch.int8)
    return codes.reshape(weight.shape), scale.squeeze(-1)


def ternary_twn(weight: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantise `weight` [N, K] to {-1, 0, 1} by a threshold, or by one for each group.

    The rule of TWN (Li et al. 2016, arXiv:1605.04711): codes = sign(w) where |w| > 0.7 * mean |w|,
    else 0; scale = mean |w| of those, the best one for these codes. Sums are taken in float64. A
    weight of zeros gets codes 0 and scale 0.

    Args:
        group: so many consecutive columns of a row have a scale of their own; it divides K.

    Returns codes int8 [N, K] and scale float32 [1], with groups [N, K / group].
    """
    blocks = _blocks(weight, group)
    magnitude = blocks.abs()
    kept = magnitude > 0.7 * _mean(magnitude)
    total = torch.where(kept, magnitude, 0.0).sum(-1, dtype=torch.float64)
    scale = (total / kept.sum(-1).clamp(min=1)).float()
    return (blocks.sign() * kept).to(torch.int8).reshape(weight.shape), scale


def _blocks(weight: Tensor, group: int | None) -> Tensor:
    """What shares one scale in the last dimension: float32 [1, N * K] or [N, K / group, group]."""
    if group is None:
        return weight.float().reshape(1, -1)
    n, k = weight.shape
    return weight.float().reshape(n, k // group, group)


def _mean(blocks: Tensor) -> Tensor:
    """Over the last dimension, which stays; float64; 0 of nothing."""
    return blocks.sum(-1, keepdim=True, dtype=torch.float64) / max(1, blocks.shape[-1])


def two_of_four(weight: Tensor) -> Tensor:
    """Mark the two largest magnitudes of every four consecutive columns; among equals the first.
    NaN counts as larger than any number.

    Returns a bool mask of the shape of `weight` [N, K]. A last group of fewer than four columns
    keeps at most two as well.
    """
    n, k = weight.shape
    # As integers the bits of magnitudes have the same order, and NaN, the largest, has a place.
    magnitude = weight.detach().float().view(torch.int32) & 0x7FFF_FFFF
    if k % 4:  # -1 is smaller than any magnitude, so that padding never takes a place
        magnitude = torch.nn.functional.pad(magnitude, (0, -k % 4), value=-1)
    groups = magnitude.reshape(n, -(-k // 4), 4).permute(2, 0, 1).contiguous()
    before = {}  # (i, j): whether i goes before j
    for i, j in itertools.combinations(range(4), 2):
        before[i, j] = groups[i] >= groups[j]
        before[j, i] = ~before[i, j]
    kept = []
    for i in range(4):
        a, b, c = (before[i, j] for j in range(4) if j != i)
        kept.append((a & b) | (c & (a | b)))  # it goes before at least two of the others
    return torch.stack(kept, -1).flatten(1)[:, :k]


def sparse24(weight: Tensor) -> tuple[Tensor, None]:
    """`weight` [N, K] with the other two of every four set to 0 (see `two_of_four`); no scale."""
    return only(two_of_four(weight), weight), None


def sparse24_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`int8_absmax` of what `sparse24` keeps."""
    return int8_absmax(sparse24(weight)[0])


def ternary24_absmean(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise what `sparse24` keeps of `weight` [N, K] to {-1, 0, 1} by its mean magnitude.

    As `ternary_absmean`, but scale is the mean magnitude of the non-zeros that are kept: the mean
    of all weights would be too small a scale for the larger half of them. So a weight that is
    2:4-sparse and ternary already keeps its values.

    Returns codes int8 [N, K] and scale float32 [1].
    """
    kept = sparse24(weight)[0].float()
    magnitudes = kept.abs().sum(dtype=torch.float64)
    scale = (magnitudes / (kept != 0).sum().clamp(min=1)).float()
    codes = torch.where(scale > 0, kept / scale, 0.0).round().clamp(-1, 1).to(torch.int8)
    return codes, scale.reshape(1)


# Choices, without their group size, whose activations stay floats.
FLOAT_INPUT = ("int8-weight", "sparse24")

WeightRule = Callable[[Tensor], tuple[Tensor, Tensor | None]]

# What becomes of a weight [N, K] under each choice of a recipe: its values [N, K], and their scale
# ([N] or [1]; None where the values are floats). Where there is a scale, activations are int8 rows,
# but under FLOAT_INPUT.
WEIGHT_RULES: dict[str, WeightRule] = {
    "int8": int8_absmax,
    "int8-weight": int8_absmax,
    "ternary": ternary_absmean,
    "ternary-twn": ternary_twn,
    "sparse24": sparse24,
    "sparse24-int8": sparse24_int8,
    "ternary24": ternary24_absmean,
}


def weight_rule(choice: str) -> WeightRule:
    """The rule of a choice that may end in a group size; the scale then is [N, K / group].

    Raises KeyError for another choice, and as `split_group` does.
    """
    base, group = split_group(choice)
    rule = WEIGHT_RULES[base]
    return rule if group is None else partial(rule, group=group)


def dense(values: Tensor, scale: Tensor | None) -> Tensor:
    """The float32 weight [N, K] that values and scale [1], [N] or [N, groups] stand for."""
    return values.float() if scale is None else scaled_by_groups(values, scale)
