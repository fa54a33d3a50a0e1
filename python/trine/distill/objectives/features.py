"""Objectives that match features: hints, hidden states, several scales, masked generation."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trine.distill.objectives.base import (
    Batch,
    Objective,
    Terms,
    View,
    counted_tokens,
    look_at_both,
    mean_of_counted,
    pooled_to_smaller,
    same_width,
)

__all__ = [
    "HiddenStates",
    "Hint",
    "MaskedGeneration",
    "MultiScale",
    "every_layer",
    "last_layers",
    "uniform_layers",
]


class Hint(Objective):
    """mean of (r(F_S) - F_T)^2, or of |r(F_S) - F_T| (FitNets, arXiv:1412.6550).

    F are features [B, D] or feature maps [B, C, H, W]; maps of different sizes are both brought to
    the smaller height and width by average pooling. The paper's sum over elements, halved, is here
    the mean, so that the term does not grow with the layer.

    Args:
        student, teacher: names in the views.
        adapter: r, `nn.Linear(D_S, D_T)` or `nn.Conv2d(C_S, C_T, 1)`; None: the features as they
            are. It is trained with the student; `parameter_groups` gives it a rate of its own.
        norm: 2 for squares, 1 for magnitudes.
        name: of the term.
    """

    def __init__(
        self,
        student: str,
        teacher: str,
        adapter: nn.Module | None = None,
        *,
        norm: int = 2,
        name: str = "hint",
    ) -> None:
        super().__init__()
        if norm not in (1, 2):
            raise ValueError(f"Hint: norm must be 1 or 2, it is {norm}")
        self.keys, self.norm, self.name = (student, teacher), norm, name
        self.adapter = nn.Identity() if adapter is None else adapter

    def forward(self, student: View, teacher: View, batch: Batch) -> Terms:
        of_student, of_teacher = look_at_both(student, teacher, *self.keys)
        of_student = self.adapter(of_student)
        same_width(of_student, of_teacher, 1, "Hint")
        if of_student.dim() == 4:
            of_student, of_teacher = pooled_to_smaller(of_student, of_teacher)
        loss = F.mse_loss if self.norm == 2 else F.l1_loss
        return {self.name: loss(of_student, of_teacher)}


class HiddenStates(Objective):
    """Hidden states of token sequences, layer by layer; the mean over the mapped pairs of layers.

    With "mse" the mean over real tokens and channels of (W h_S - h_T)^2 (TinyBERT, Jiao et al.
    2020, arXiv:1909.10351; its embedding loss is the same with the embeddings' output as a layer).
    With "cosine" the mean over real tokens of 1 - cos(W h_S, h_T) (DistilBERT, Sanh et al. 2019,
    arXiv:1910.01108).

    Args:
        layers: pairs of names (student's, teacher's): `uniform_layers` and its like make them.
        projection: W, shared by all pairs, `nn.Linear(D_S, D_T, bias=False)`; None: h_S itself.
        loss: "mse" or "cosine".
        mask: name in the batch of what tells padding (0) from tokens [B, L]; None: all count.
        name: of the term.

    Views: hidden states [B, L, D] of both models with the same L.
    """

    def __init__(
        self,
        layers: Sequence[tuple[str, str]],
        projection: nn.Module | None = None,
        *,
        loss: str = "mse",
        mask: str | None = "attention_mask",
        name: str = "hidden",
    ) -> None:
        super().__init__()
        if loss not in ("mse", "cosine"):
            raise ValueError(f"HiddenStates: loss must be 'mse' or 'cosine', it is '{loss}'")
        if not layers:
            raise ValueError("HiddenStates: layers must hold at least one pair of names")
        self.layers, self.loss, self.mask, self.name = list(layers), loss, mask, name
        self.projection = nn.Identity() if projection is None else projection

    def forward(self, student: View, teacher: View, batch: Batch) -> Terms:
        losses = []
        for pair in self.layers:
            of_student, of_teacher = look_at_both(student, teacher, *pair)
            of_student = self.projection(of_student)
            same_width(of_student, of_teacher, 2, "HiddenStates")
            counted = counted_tokens(batch, self.mask, of_teacher.shape[:2])
            if self.loss == "mse":
                of_tokens = (of_student - of_teacher).square().mean(-1)
            else:
                of_tokens = 1 - F.cosine_similarity(of_student, of_teacher, dim=-1)
            losses.append(mean_of_counted(of_tokens, counted))
        return {self.name: torch.stack(losses).mean()}


class MultiScale(Objective):
    """Feature maps at several scales, where the teacher looks (pyramid pooling, He et al. 2015,
    arXiv:1406.4729; attention masks as in FGD, Yang et al. 2022, arXiv:2111.11837).

    For every scale n both maps are averaged to n x n; the term is the mean over scales of the mean
    over elements of w * (r(F_S) - F_T)^2. w is 1, or with `temperature` the foreground of the
    teacher at that scale, n * n * softmax over positions of (mean over channels of |F_T|) /
    temperature, whose mean is 1.

    Args:
        student, teacher: names in the views, of maps [B, C, H, W].
        adapter: r, as of `Hint`.
        scales: n of each; a map smaller than n x n is an error.
        temperature: of the foreground; None: every position counts the same.
        name: of the term.
    """

    def __init__(
        self,
        student: str,
        teacher: str,
        adapter: nn.Module | None = None,
        *,
        scales: Sequence[int] = (1, 2, 4),
        temperature: float | None = None,
        name: str = "multi_scale",
    ) -> None:
        super().__init__()
        self.keys, self.scales, self.temperature = (student, teacher), tuple(scales), temperature
        self.adapter, self.name = nn.Identity() if adapter is None else adapter, name

    def forward(self, student: View, teacher: View, batch: Batch) -> Terms:
        of_student, of_teacher = look_at_both(student, teacher, *self.keys)
        of_student = self.adapter(of_student)
        same_width(of_student, of_teacher, 1, "MultiScale")
        smallest = min(*of_student.shape[2:], *of_teacher.shape[2:])
        if max(self.scales) > smallest:
            raise ValueError(
                f"MultiScale: the maps are {smallest} wide at their narrowest, too small for a "
                f"scale of {max(self.scales)}"
            )
        return {
            self.name: torch.stack(
                [self._at(n, of_student, of_teacher) for n in self.scales]
            ).mean()
        }

    def _at(self, scale: int, of_student: Tensor, of_teacher: Tensor) -> Tensor:
        s, t = (F.adaptive_avg_pool2d(maps, scale) for maps in (of_student, of_teacher))
        of_positions = (s - t).square().mean(1)
        if self.temperature is None:
            return of_positions.mean()
        looks = t.abs().mean(1).flatten(1) / self.temperature
        foreground = looks.softmax(1) * looks.shape[1]
        return (foreground * of_positions.flatten(1)).mean()


class MaskedGeneration(Objective):
    """The teacher's features, generated from a part of the student's (MGD, Yang et al. 2022,
    arXiv:2205.01529): mean of (G(M * r(F_S)) - F_T)^2.

    M drops each position of each map with probability `dropped` (all channels of it), anew in every
    call, from torch's random numbers; G is a 3x3 convolution, ReLU, and a 3x3 convolution.

    Args:
        student, teacher: names in the views, of maps [B, C, H, W] of one size.
        channels: C of the teacher.
        adapter: r, where the student's channels differ.
        dropped: the share of positions that the student has to do without.
        name: of the term.
    """

    def __init__(
        self,
        student: str,
        teacher: str,
        channels: int,
        adapter: nn.Module | None = None,
        *,
        dropped: float = 0.65,
        name: str = "masked",
    ) -> None:
        super().__init__()
        if not 0 <= dropped < 1:
            raise ValueError(f"MaskedGeneration: dropped must lie in [0, 1), it is {dropped}")
        self.keys, self.dropped, self.name = (student, teacher), dropped, name
        self.adapter = nn.Identity() if adapter is None else adapter
        self.generate = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, student: View, teacher: View, batch: Batch) -> Terms:
        of_student, of_teacher = look_at_both(student, teacher, *self.keys)
        of_student = self.adapter(of_student)
        same_width(of_student, of_teacher, 1, "MaskedGeneration")
        of_student, of_teacher = pooled_to_smaller(of_student, of_teacher)
        kept = torch.rand_like(of_student[:, :1]) >= self.dropped
        return {self.name: F.mse_loss(self.generate(of_student * kept), of_teacher)}


def uniform_layers(student_layers: int, teacher_layers: int) -> list[int]:
    """The teacher's layer (from 0) for each of the student's: every (teacher / student)th, so that
    both end in their last layer (TinyBERT's g(m) = m * teacher / student).

    Raises ValueError where the student has more layers than the teacher, or none.
    """
    if not 0 < student_layers <= teacher_layers:
        raise ValueError(
            f"a student of {student_layers} layers can't be mapped to a teacher of "
            f"{teacher_layers}; it needs at least one and at most as many"
        )
    return [(m + 1) * teacher_layers // student_layers - 1 for m in range(student_layers)]


def last_layers(student_layers: int, teacher_layers: int) -> list[int]:
    """The teacher's last layers, one for each of the student's."""
    uniform_layers(student_layers, teacher_layers)  # for its check
    return list(range(teacher_layers - student_layers, teacher_layers))


def every_layer(path: str, layers: Sequence[int], name: str = "h") -> dict[str, str]:
    """Paths for `Capture` of numbered layers: every_layer("encoder.layer.{}", [1, 3]) is
    {"h0": "encoder.layer.1", "h1": "encoder.layer.3"}; names count from 0 in the order given."""
    return {f"{name}{i}": path.format(layer) for i, layer in enumerate(layers)}
