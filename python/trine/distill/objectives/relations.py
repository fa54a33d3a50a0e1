"""Objectives that match relations between the examples of a batch, or between two layers.

None needs as many channels in the student as in the teacher (but `SolutionFlow`)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.distill.objectives.base import (
    Batch,
    Objective,
    Terms,
    View,
    look_at_both,
)

__all__ = [
    "AngleRelations",
    "CorrelationCongruence",
    "DistanceRelations",
    "SimilarityPreserving",
    "SolutionFlow",
]


class _OfExamples(Objective):
    """Of features, flattened to [B, D]; a batch of at least `least` examples."""

    least = 2

    def __init__(self, student: str, teacher: str, *, name: str) -> None:
        super().__init__()
        self.keys, self.name = (student, teacher), name

    def forward(self, student: View, teacher: View, batch: Batch) -> Terms:
        of_student, of_teacher = look_at_both(student, teacher, *self.keys)
        if of_student.shape[0] != of_teacher.shape[0] or of_student.shape[0] < self.least:
            raise ValueError(
                f"{type(self).__name__}: relations need the same {self.least} or more examples in "
                f"both views; they have {of_student.shape[0]} and {of_teacher.shape[0]}"
            )
        return {self.name: self.loss(of_student.flatten(1), of_teacher.flatten(1))}

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        raise NotImplementedError


class DistanceRelations(_OfExamples):
    """RKD-D (Park et al. 2019, arXiv:1904.05068): the mean over pairs i != j of
    huber(|s_i - s_j| / mu_S - |t_i - t_j| / mu_T), mu the mean distance of the batch's pairs.

    Unchanged by rotating, moving and scaling either embedding. Huber's threshold is 1. Where all
    embeddings of a model are the same its relative distances count as 0.

    Args:
        student, teacher: names in the views, [B, ...], B >= 2; the rest is flattened.
        name: of the term.
    """

    def __init__(self, student: str, teacher: str, *, name: str = "distance") -> None:
        super().__init__(student, teacher, name=name)

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


def _relative_distances(features: Tensor) -> Tensor:
    """Of all pairs, over their mean."""
    distances = F.pdist(features)
    mean = distances.mean()
    return distances / torch.where(mean > 0, mean, 1.0)


class AngleRelations(_OfExamples):
    """RKD-A (Park et al. 2019, arXiv:1904.05068): the mean over triplets of three different
    examples of huber(cos S_ijk - cos T_ijk), cos_ijk that of the angle at j between i and k.

    Unchanged by rotating, moving and scaling either embedding. Memory grows with B^3: 67 MB for
    each model and 256 examples.

    Args:
        student, teacher: names in the views, [B, ...], B >= 3; the rest is flattened.
        name: of the term.
    """

    least = 3

    def __init__(self, student: str, teacher: str, *, name: str = "angle") -> None:
        super().__init__(student, teacher, name=name)

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        differences = F.smooth_l1_loss(_cosines(student), _cosines(teacher), reduction="none")
        count = student.shape[0]
        same = torch.eye(count, dtype=torch.bool, device=student.device)
        # [j, i, k]; i == j and k == j are 0 in both already.
        differences = differences.masked_fill(same[None], 0.0)
        return differences.sum() / (count * (count - 1) * (count - 2))


def _cosines(features: Tensor) -> Tensor:
    """[j, i, k]: of the angle at j between i and k; 0 where two of them coincide."""
    directions = F.normalize(features[None, :, :] - features[:, None, :], dim=-1)
    return directions @ directions.transpose(1, 2)


class SimilarityPreserving(_OfExamples):
    """SP (Tung & Mori 2019, arXiv:1907.09682): |G_T - G_S|_F^2 / B^2, G = Q Q^T of the features
    Q [B, D], each row of G divided by its L2 norm.

    Args:
        student, teacher: names in the views, [B, ...]; the rest is flattened.
        name: of the term.
    """

    def __init__(self, student: str, teacher: str, *, name: str = "similarity") -> None:
        super().__init__(student, teacher, name=name)

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.mse_loss(*(F.normalize(q @ q.T, dim=1) for q in (student, teacher)))


class CorrelationCongruence(_OfExamples):
    """CC (Peng et al. 2019, arXiv:1904.01802): |C_T - C_S|_F^2 / B^2, C_ij = k(f_i, f_j) of
    features f normalised to length 1, with the kernel

    - "bilinear": f_i . f_j
    - "gaussian": exp(-gamma * |f_i - f_j|^2)
    - "taylor": the Gaussian's series, exp(-2 gamma) * sum of (2 gamma)^p / p! * (f_i . f_j)^p for
      p = 0 to `order`, as the paper computes it

    Args:
        student, teacher: names in the views, [B, ...]; the rest is flattened.
        kernel, gamma, order: see above; the paper's are "taylor", 0.4 and 2.
        name: of the term.
    """

    def __init__(
        self,
        student: str,
        teacher: str,
        *,
        kernel: str = "taylor",
        gamma: float = 0.4,
        order: int = 2,
        name: str = "correlation",
    ) -> None:
        super().__init__(student, teacher, name=name)
        if kernel not in ("bilinear", "gaussian", "taylor"):
            raise ValueError(
                "CorrelationCongruence: kernel must be 'bilinear', 'gaussian' or 'taylor', it is "
                f"'{kernel}'"
            )
        self.kernel, self.gamma, self.order = kernel, gamma, order

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.mse_loss(self._correlations(student), self._correlations(teacher))

    def _correlations(self, features: Tensor) -> Tensor:
        features = F.normalize(features, dim=1)
        products = features @ features.T
        if self.kernel == "bilinear":
            return products
        if self.kernel == "gaussian":
            return torch.exp(2 * self.gamma * (products - 1))  # |f - g|^2 = 2 - 2 f.g
        series = [
            (2 * self.gamma) ** p / math.factorial(p) * products**p for p in range(self.order + 1)
        ]
        return math.exp(-2 * self.gamma) * torch.stack(series).sum(0)


class SolutionFlow(Objective):
    """FSP (Yim et al. 2017, CVPR): the mean over examples of |G_T - G_S|_F^2, with the flow between
    two layers G = (1 / HW) * sum over positions of F1^T F2, [C1, C2].

    Both layers' maps are max-pooled to the smaller of their sizes, as in the paper. Student and
    teacher may differ in size of maps, not in channels.

    Args:
        student, teacher: pairs of names in the views, (first layer, second layer), of maps
            [B, C, H, W].
        name: of the term.
    """

    def __init__(
        self, student: tuple[str, str], teacher: tuple[str, str], *, name: str = "flow"
    ) -> None:
        super().__init__()
        self.pairs, self.name = tuple(zip(student, teacher, strict=True)), name

    def forward(self, student: View, teacher: View, batch: Batch) -> Terms:
        first, second = (look_at_both(student, teacher, *keys) for keys in self.pairs)
        of_student, of_teacher = (_flow(f, g) for f, g in zip(first, second, strict=True))
        if of_student.shape != of_teacher.shape:
            raise ValueError(
                "SolutionFlow: student and teacher must have the same channels in both layers; "
                f"their flows are {list(of_student.shape[1:])} and {list(of_teacher.shape[1:])}"
            )
        return {self.name: (of_student - of_teacher).square().sum((1, 2)).mean()}


def _flow(first: Tensor, second: Tensor) -> Tensor:
    size = tuple(min(first.shape[d], second.shape[d]) for d in (2, 3))
    first, second = (F.adaptive_max_pool2d(maps, size).flatten(2) for maps in (first, second))
    return first @ second.transpose(1, 2) / first.shape[2]
