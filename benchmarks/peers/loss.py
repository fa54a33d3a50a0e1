"""The distillation losses as PyTorch gives them."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# But for forward KL, of log p of the student and log q of the teacher; the mean over rows.
Divergence = Callable[[Tensor, Tensor], Tensor]


def _kl(of: Tensor, to: Tensor) -> Tensor:
    return F.kl_div(to, of, reduction="batchmean", log_target=True)


def _mixture(log_p: Tensor, log_q: Tensor) -> Tensor:
    """With equal shares, as GKD's implementations have it."""
    return torch.logaddexp(log_p, log_q) - math.log(2)


def _jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    mixture = _mixture(log_p, log_q)
    return (_kl(log_p, mixture) + _kl(log_q, mixture)) / 2


def _total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() - log_q.exp()).abs().sum() / (2 * len(log_p))


DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": lambda log_p, log_q: F.kl_div(log_q, log_p.exp(), reduction="batchmean"),
    "jsd": _jsd,
    "skewed_forward_kl": lambda log_p, log_q: _kl(log_q, _mixture(log_p, log_q)),
    "skewed_reverse_kl": lambda log_p, log_q: _kl(log_p, _mixture(log_p, log_q)),
    "total_variation": _total_variation,
}


def eager(
    student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float, divergence: str
) -> Tensor:
    """T^2 * D, the mean over rows; with labels the mean of that and the cross entropy."""
    log_p = F.log_softmax(student / temperature, -1)
    if divergence == "forward_kl":
        soft = F.kl_div(log_p, F.softmax(teacher / temperature, -1), reduction="batchmean")
    else:
        soft = DIVERGENCES[divergence](log_p, F.log_softmax(teacher / temperature, -1))
    soft = soft * temperature**2
    return soft if labels is None else 0.5 * soft + 0.5 * F.cross_entropy(student, labels)


def cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
    """Of the labels alone: what a training without a teacher computes."""
    return F.cross_entropy(student, labels)


def compiled(function: Callable) -> Callable:
    """Through torch.compile, for exactly the shapes that it is called with."""
    torch._dynamo.reset()  # else the shapes of earlier functions count against its limit
    return torch.compile(function, dynamic=False)
