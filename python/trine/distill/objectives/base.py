"""What every objective is, and what they share."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Batch", "Objective", "Terms", "Together", "View"]

View = Mapping[str, Tensor]  # what `Capture` returns: tensors by name
Batch = Mapping[str, Any]  # what the models were called with, and labels
Terms = dict[str, Tensor]  # scalars to be weighed and added


class Objective(nn.Module):
    """What a student should have in common with its teacher, as terms of a loss.

    Called with two views and the batch, it returns its terms by name: float32 scalars, each a mean
    over what counts (never over padding), which a balance weighs. The teacher is a constant: no
    gradient flows to it. Inputs in 16 bits are widened first, and float64 stays. Parameters that an
    objective has (adapters) are trained beside the student's.
    """

    def forward(self, student: View, teacher: View, batch: Batch) -> Terms:
        raise NotImplementedError


class Together(Objective):
    """All terms of several objectives.

    Raises ValueError where two of them have a term of the same name: give one another `name`.
    """

    def __init__(self, *objectives: Objective) -> None:
        super().__init__()
        self.objectives = nn.ModuleList(objectives)

    def forward(self, student: View, teacher: View, batch: Batch) -> Terms:
        terms: Terms = {}
        for objective in self.objectives:
            for name, value in objective(student, teacher, batch).items():
                if name in terms:
                    raise ValueError(
                        f"Together: two objectives call a term '{name}'; give one another name="
                    )
                terms[name] = value
        return terms


def look(view: View, key: str, who: str) -> Tensor:
    """A tensor of a view."""
    if key not in view:
        raise ValueError(
            f"the {who}'s view has no '{key}'; capture it by that name. It has: "
            + (", ".join(sorted(view)) or "nothing")
        )
    return view[key]


def look_at_both(
    student: View, teacher: View, student_key: str, teacher_key: str
) -> tuple[Tensor, Tensor]:
    """The student's tensor and the teacher's, a constant, in fp32 or float64."""
    seen = look(student, student_key, "student"), look(teacher, teacher_key, "teacher").detach()
    if torch.float64 in (seen[0].dtype, seen[1].dtype):
        return seen[0].double(), seen[1].double()
    return seen[0].float(), seen[1].float()


def counted_tokens(batch: Batch, mask: str | None, shape: torch.Size) -> Tensor | None:
    """bool [B, L] of the tokens that count, or None where all do."""
    if mask is None:
        return None
    if mask not in batch:
        raise ValueError(
            f"the batch has no '{mask}', which tells padding from text; add it, or give the "
            "objective mask=None if there is no padding"
        )
    tokens = batch[mask]
    if tokens.shape != shape:
        raise ValueError(
            f"'{mask}' must have a value for each token, {list(shape)}; it has {list(tokens.shape)}"
        )
    return tokens.bool()


def mean_of_counted(values: Tensor, counted: Tensor | None) -> Tensor:
    """The mean of those values that count; the others are not even multiplied (they may be NaN)."""
    if counted is None:
        return values.mean()
    return torch.where(counted, values, 0.0).sum() / counted.sum()


def same_width(student: Tensor, teacher: Tensor, dim: int, what: str) -> None:
    if student.shape[dim] != teacher.shape[dim]:
        raise ValueError(
            f"{what}: the student's features have {student.shape[dim]} channels and the teacher's "
            f"{teacher.shape[dim]}; give adapter=, a module that maps the one to the other"
        )


def pooled_to_smaller(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Of feature maps [B, C, H, W] both at the smaller height and width, by average pooling."""
    size = tuple(min(student.shape[d], teacher.shape[d]) for d in (2, 3))
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
