"""The distillation loss as PyTorch gives it, and cross-entropy alone as context."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def compiled(function: Callable) -> Callable:
    """torch.compile, for exactly the shapes that it is called with."""
    return torch.compile(function, dynamic=False)


def eager_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_p_student = F.log_softmax(student / temperature, -1)
    p_teacher = F.softmax(teacher / temperature, -1)
    return F.kl_div(log_p_student, p_teacher, reduction="batchmean") * temperature**2


def cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Hard labels, one row of logits: what training costs without a teacher."""
    return F.cross_entropy(student, teacher[:, 0].long().clamp(0, student.shape[1] - 1))


# By name, and whether the op competes with it or only stands beside it.
PEERS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "eager": (eager_kl, True),
    "torch.compile": (compiled(eager_kl), True),
    "cross-entropy eager": (cross_entropy, False),
    "cross-entropy compiled": (compiled(cross_entropy), False),
}
