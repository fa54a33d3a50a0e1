"""The solver that SparseGPT and GPTQ share: columns change in turn, the later ones make up for it.

For a weight W [N, K] and the Gram matrix G = X^T X of its inputs, each row w of W is changed to v
so that the output error ||X (w - v)^T||^2 = (w - v) G (w - v)^T stays small. When column j has
become v_j, the best change of the columns after it is (Optimal Brain Surgeon, Hassibi & Stork 1993)

    w_k -= (w_j - v_j) / [H^-1]_jj * [H^-1]_jk,  and the error grows by  (w_j - v_j)^2 / [H^-1]_jj,

where H = G + damping * mean(diag G) * I, rows and columns from j on. The inverses for all j are the
rows of one matrix: with H^-1 = U^T U (U upper triangular), [H^-1]_jj = U_jj^2 and [H^-1]_jk =
U_jj U_jk (Frantar et al., GPTQ, arXiv:2210.17323; SparseGPT, arXiv:2301.00774).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class ColumnRule(Protocol):
    """What a column's values may become: a mask for SparseGPT, a grid of levels for GPTQ.

    Attribute `group`: over how many columns the rule decides at once. 4 for 2:4 masks, the group
    size of a group-wise quantiser, None for the whole row (a scale per row).
    """

    group: int | None

    def start(self, first: int, weight: Tensor, diagonal: Tensor) -> None:
        """Called before the first column of each group.

        Args:
            first: the group's first column.
            weight: its columns [N, width] as they are by now (all earlier columns' errors are in).
            diagonal: U_jj of its columns [width]; w^2 / U_jj^2 is what setting a weight to 0 costs.
        """

    def column(self, j: int, weight: Tensor) -> Tensor:
        """What column j, now `weight` [N], becomes: [N]."""


def inverse_factor(gram: Tensor, damping: float = 0.01) -> Tensor:
    """U, upper triangular, float64 [K, K]: (gram + damping * mean(diag gram) * I)^-1 = U^T U.

    A column that never held anything but 0 (diagonal 0) counts as independent of all others.

    Raises ValueError for a negative damping, NaN, and a matrix that is not positive definite.
    """
    if damping < 0:
        raise ValueError(f"damping is {damping}; it must not be negative")
    hessian = gram.double()
    if not torch.isfinite(hessian).all():
        raise ValueError("the second moments hold NaN or infinity; calibrate again")
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    added = torch.where(diagonal == 0, 1.0, damping * diagonal.mean(-1, keepdim=True))
    lower, failed = torch.linalg.cholesky_ex(hessian + torch.diag_embed(added))
    if failed.any():
        raise ValueError(
            "the second moments are not positive definite (fewer rows than columns, or columns "
            f"that depend on each other); use more data or a damping above {damping}"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def solve_columns(
    weight: Tensor, gram: Tensor, rule: ColumnRule, *, damping: float = 0.01, block: int = 128
) -> Tensor:
    """`weight` [N, K] with every column as `rule` says, the later columns updated for each.

    Columns are taken from left to right; for another order permute the columns of `weight` and the
    rows and columns of `gram` alike, and the result back. The columns behind a block of `block` are
    updated once a block, which changes the time alone (it is a matrix product then).

    Args:
        weight: any float dtype; computed in float32 (float64 where it is that).
        gram: X^T X [K, K] of the rows of its input (`SecondMoment`); its scale does not matter.
        rule: see `ColumnRule`.
        damping: added to the diagonal, as a share of its mean. 0.01 as published.

    Returns:
        [N, K] in weight's dtype, a new tensor.

    Raises ValueError where shapes do not fit, and as `inverse_factor` does.
    """
    k = weight.shape[1]
    if gram.shape != (k, k):
        raise ValueError(
            f"a weight of {k} columns needs second moments [{k}, {k}]; got {list(gram.shape)}"
        )
    if block < 1:
        raise ValueError(f"block is {block}; it must be at least 1")
    wide = torch.promote_types(weight.dtype, torch.float32)
    current = weight.detach().to(wide, copy=True)
    result = torch.empty_like(current)
    factor = inverse_factor(gram, damping).to(wide)
    group = min(rule.group or k, k)
    for start, end in _blocks(k, group, block):
        part, upper = current[:, start:end], factor[start:end, start:end]
        errors = torch.empty_like(part)
        for j in range(end - start):
            column = start + j
            if column % group == 0:
                ahead = slice(column, min(column + group, k))
                rule.start(column, current[:, ahead].clone(), factor.diagonal()[ahead])
            value = rule.column(column, part[:, j].clone()).to(wide)
            error = (part[:, j] - value) / upper[j, j]
            part[:, j:] -= error[:, None] * upper[j, j:]
            result[:, column], errors[:, j] = value, error
        current[:, end:] -= errors @ factor[start:end, end:]
    return result.to(weight.dtype)


def _blocks(k: int, group: int, block: int) -> list[tuple[int, int]]:
    """Where blocks start and end: a group begins with a block, or lies within one.

    (At its start a group must see columns that every earlier error is in.)
    """
    span = max(group, block // group * group)
    return [
        (first, min(first + block, begin + span, k))
        for begin in range(0, k, span)
        for first in range(begin, min(begin + span, k), block)
    ]


def output_error(before: Tensor, after: Tensor, gram: Tensor) -> Tensor:
    """||X (before - after)^T||^2, summed over all outputs; float64, of groups [G]."""
    change = (before - after).double()
    return ((change @ gram.double()) * change).sum((-2, -1))
