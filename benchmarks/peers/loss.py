"""The distillation losses as PyTorch gives it, and cross-entropy alone as context."""

import math
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


def eager_reverse_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return eager_kl(teacher, student, temperature)


def eager_jsd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """With equal shares, as GKD's implementations have it."""
    log_p, log_q = (F.log_softmax(z / temperature, -1) for z in (student, teacher))
    mixture = torch.logaddexp(log_p, log_q) - math.log(2)
    of_p, of_q = (
        F.kl_div(mixture, z, reduction="batchmean", log_target=True) for z in (log_p, log_q)
    )
    return (of_p + of_q) / 2 * temperature**2


def cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Hard labels, one row of logits: what training costs without a teacher."""
    return F.cross_entropy(student, teacher[:, 0].long().clamp(0, student.shape[1] - 1))


# The other divergences of the op that the peers are asked for, too.
EAGER = {"forward_kl": eager_kl, "reverse_kl": eager_reverse_kl, "jsd": eager_jsd}

# By divergence and name, and whether the op competes with it or only stands beside it.
PEERS: dict[str, dict[str, tuple[Callable[..., Tensor], bool]]] = {
    divergence: {"eager": (eager, True), "torch.compile": (compiled(eager), True)}
    for divergence, eager in EAGER.items()
}
PEERS["forward_kl"] |= {
    "cross-entropy eager": (cross_entropy, False),
    "cross-entropy compiled": (compiled(cross_entropy), False),
}
