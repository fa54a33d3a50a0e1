"""What `softmax_kl` means, in plain PyTorch and float64. Tests compare values and gradients."""

import torch
from torch import Tensor


def softmax_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    reduction: str = "batchmean",
) -> Tensor:
    """The loss in float64; differentiable by autograd wherever every logit is finite."""
    a = torch.log_softmax(student_logits.double() / temperature, -1)
    b = torch.log_softmax(teacher_logits.double() / temperature, -1)
    p = b.exp()
    terms = torch.where(p == 0, 0.0, p * (b - a))
    losses = temperature**2 * terms.sum(-1)
    if reduction == "none":
        return losses
    divisor = {"batchmean": losses.numel(), "sum": 1, "mean": terms.numel()}[reduction]
    return losses.sum() / divisor


def example_inputs(
    *leading: int, classes: int = 37, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Random logits of a student and a teacher that disagree, of the spread that models have."""
    return (
        (3 * torch.randn(*leading, classes)).to(dtype),
        (3 * torch.randn(*leading, classes)).to(dtype),
    )
