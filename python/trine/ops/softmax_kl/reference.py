"""What `softmax_kl` means, in plain PyTorch and float64. Tests compare values and gradients."""

import math

import torch
from torch import Tensor


def softmax_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    divergence: str = "forward_kl",
    beta: float = 0.5,
    row_weight: Tensor | None = None,
) -> Tensor:
    """The loss in float64; differentiable by autograd, any number of times, wherever every logit
    is finite."""
    a = torch.log_softmax(student_logits.double() / temperature, -1)
    b = torch.log_softmax(teacher_logits.double() / temperature, -1)
    losses = temperature**2 * DIVERGENCES[divergence](a, b, beta)
    weights = torch.ones_like(losses)
    if row_weight is not None:
        weights = row_weight.double().reshape(losses.shape)
        losses = torch.where(weights == 0, 0.0, weights * losses)
    if reduction == "none":
        return losses
    divisor = {"batchmean": 1, "sum": 0, "mean": student_logits.shape[-1]}[reduction]
    return losses.sum() / (divisor * weights.sum() if divisor else 1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum of p * (log p - log q); classes of p = 0 count 0."""
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)


def mixed(a: Tensor, b: Tensor, beta: float) -> Tensor:
    """log of beta * exp(a) + (1 - beta) * exp(b)."""
    return torch.logaddexp(a + math.log(beta), b + math.log1p(-beta))


# Of log p of the student, log q of the teacher, and beta: a divergence per row.
DIVERGENCES = {
    "forward_kl": lambda p, q, beta: kl(q, p),
    "reverse_kl": lambda p, q, beta: kl(p, q),
    "jsd": lambda p, q, beta: (
        beta * kl(q, mixed(q, p, beta)) + (1 - beta) * kl(p, mixed(q, p, beta))
    ),
    "skewed_forward_kl": lambda p, q, beta: kl(q, mixed(q, p, beta)),
    "skewed_reverse_kl": lambda p, q, beta: kl(p, mixed(p, q, beta)),
    "total_variation": lambda p, q, beta: (p.exp() - q.exp()).abs().sum(-1) / 2,
}


def example_inputs(
    *leading: int, classes: int = 37, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Random logits of a student and a teacher that disagree, of the spread that models have."""
    return (
        (3 * torch.randn(*leading, classes)).to(dtype),
        (3 * torch.randn(*leading, classes)).to(dtype),
    )
