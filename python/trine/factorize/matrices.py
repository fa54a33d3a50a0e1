"""The best approximation of a matrix by one of lower rank, in the norm that counts."""

from __future__ import annotations

import torch
from torch import Tensor


def root_of(gram: Tensor) -> Tensor:
    """S, float64 [K, K], with S S^T = G; also of a singular G."""
    values, vectors = torch.linalg.eigh(gram.double())
    # G is a sum of squares: what is negative is so by rounding.
    return vectors * values.clamp(min=0).sqrt()


def directions(weight: Tensor, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The output directions of a weight in the order of what they contribute, and how much.

    For W [N, K] and rows x of input with X^T X = S S^T (S: `root`), let W S = U diag(s) V^T. With
    the first r columns U_r of U,

        W_r = U_r (U_r^T W)   minimises   ||X (W - W')^T||_F   over all W' of rank r,

    and the minimum is sqrt(s_{r+1}^2 + s_{r+2}^2 + ...): the theorem of Eckart and Young for W S.
    (SVD-LLM, arXiv:2403.07378, writes the same W_r with the inverse of S, which a projection does
    not need: a singular S is no special case.) Without it, S is I and the norm ||W - W'||_F.

    Returns:
        U [N, min(N, K)] and s [min(N, K)], descending; float64, computed in it.
    """
    wide = weight.double() if root is None else weight.double() @ root
    u, s, _ = torch.linalg.svd(wide, full_matrices=False)
    return u, s


def factors(weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(second [N, r], first [r, K]) in float64 with second @ first = U U^T W.

    u [N, r] has orthonormal columns. Each column of `second` has the norm of its row of `first`,
    so that a learning rate, or a scale, suits both.
    """
    u = u.double()
    first = u.T @ weight.double()
    scale = first.norm(dim=1).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    return u * scale, first / scale[:, None]


def relative_error(weight: Tensor, other: Tensor, gram: Tensor | None = None) -> float:
    """||W - W'||_F / ||W||_F, or ||X (W - W')^T||_F / ||X W^T||_F where G = X^T X is given.

    0 where both are 0. Takes [N, K] each; computed in float64.
    """
    size, error = (_square(m, gram) for m in (weight.double(), weight.double() - other.double()))
    return 0.0 if error == 0 else (error / size) ** 0.5 if size > 0 else float("inf")


def _square(matrix: Tensor, gram: Tensor | None) -> float:
    product = matrix if gram is None else matrix @ gram.double()
    return max(0.0, float((product * matrix).sum()))
