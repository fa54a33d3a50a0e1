"""What `linear_softmax_kl` means: logits of two linear layers, and `softmax_kl` of them."""

import torch
from torch import Tensor

from trine.ops.softmax_kl import reference


def linear_softmax_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    **options,
) -> Tensor:
    """The loss in float64, differentiable any number of times."""
    return reference.softmax_kl(
        logits(student_hidden, student_weight, student_bias),
        logits(teacher_hidden, teacher_weight, teacher_bias),
        temperature,
        reduction,
        **options,
    )


def logits(hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return hidden.double()
    return torch.nn.functional.linear(
        hidden.double(), weight.double(), None if bias is None else bias.double()
    )


def example_inputs(
    *leading: int,
    classes: int = 37,
    widths: tuple[int, int] = (12, 20),
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and weights of a student and a teacher whose logits have models' spread."""

    def model(width: int) -> tuple[Tensor, Tensor]:
        return torch.randn(*leading, width), 3 * width**-0.5 * torch.randn(classes, width)

    return tuple(t.to(dtype) for width in widths for t in model(width))
