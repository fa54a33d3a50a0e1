"""How good a classifier is, and how sure one can be of that on so many rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Draws of the bootstrap. The end points of a 95% interval then move by less than a tenth of its
# width from one seed to the next.
RESAMPLES = 10_000


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Which rows have their largest logit at the label: bool [rows].

    A row that holds NaN is wrong, whatever its label.

    Args:
        logits: floating [rows, classes].
        labels: integer [rows].

    Raises:
        ValueError: other shapes.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"correct needs logits [rows, classes] and labels [rows]; got {list(logits.shape)} "
            f"and {list(labels.shape)}"
        )
    return (logits.argmax(-1) == labels) & ~logits.isnan().any(-1)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of rows whose largest logit is at the label. Arguments as for `correct`."""
    return correct(logits, labels).double().mean().item()


def agreement(logits: Tensor, teacher_logits: Tensor) -> float:
    """The share of rows on which two models choose the same class.

    Args:
        logits, teacher_logits: floating [rows, classes].
    """
    return accuracy(logits, teacher_logits.argmax(-1))


def bootstrap_interval(
    values: Tensor, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of `values` (Efron 1979).

    `values` may be anything that there is one of per row: whether a row is right, or the difference
    between two models on it (then the interval is that of a paired comparison). Where all values
    are equal the interval has no width: the bootstrap cannot see errors that did not occur.

    Args:
        values: [rows], bool or floating.
        confidence: the share of resampled means inside the interval, in (0, 1).
        resamples: how many times the rows are drawn again, with replacement.
        seed: of the draws.

    Returns:
        The lower and the upper end.

    Raises:
        ValueError: no rows, another shape, or a confidence outside (0, 1).
    """
    if values.ndim != 1 or not len(values):
        raise ValueError(f"bootstrap_interval needs values [rows >= 1]; got {list(values.shape)}")
    if not 0 < confidence < 1:
        raise ValueError(f"bootstrap_interval: confidence is {confidence}; it must be in (0, 1)")
    # Only how often each distinct value is drawn matters, and that is multinomial.
    levels, counts = np.unique(values.detach().double().cpu().numpy(), return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(values), counts / len(values), resamples)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws @ levels / len(values), [tail, 1 - tail])
    return float(low), float(high)


def cosine_similarities(a: Tensor, b: Tensor) -> Tensor:
    """The cosine between row i of `a` and row i of `b`, computed in float64: [rows].

    Args:
        a, b: floating [rows, width].
    """
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)


def pairwise_rank_correlation(a: Tensor, b: Tensor) -> float:
    """Whether two embeddings order the pairs of rows alike: Spearman's rho, ties averaged.

    The similarity of every pair of rows (cosine, in float64) is ranked under `a` and under `b`; the
    ranks are then correlated.

    Args:
        a, b: floating [rows, width]; at least three rows (two have but one pair). The widths may
            differ.
    """
    if len(a) != len(b) or len(a) < 3:
        raise ValueError(
            f"pairwise_rank_correlation needs equally many rows, 3 or more; got {len(a)}, {len(b)}"
        )
    ranks = torch.stack([_ranks(_pair_similarities(rows)) for rows in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def _pair_similarities(rows: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(rows.double(), dim=-1)
    return (unit @ unit.T)[tuple(torch.triu_indices(len(rows), len(rows), offset=1))]


def _ranks(values: Tensor) -> Tensor:
    """The rank of each value, equal values sharing the mean of theirs."""
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / 2).double()[which]
