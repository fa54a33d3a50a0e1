"""What `softmax_kl` means, in plain PyTorch and float64. Tests compare values and gradients."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IMPOSSIBLE = -1e30  # a logarithm of 0 whose differences are still numbers
# The least that a teacher's tail is given while some class has no bin: fp32 knows 1 to this.
LEAST_TAIL = 2.0**-23


def softmax_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    divergence: str = "forward_kl",
    beta: float = 0.5,
    row_weight: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    teacher_indices: Tensor | None = None,
    teacher_is_log_probabilities: bool = False,
    classes: int | None = None,
    softcap: tuple[float | None, float | None] = (None, None),
    logit_scale: tuple[float, float] = (1.0, 1.0),
    denominator: float | None = None,
    scale_by_t_squared: bool = True,
) -> Tensor:
    """The loss in float64; differentiable by autograd, any number of times, wherever every logit
    is finite."""
    leading = student_logits.shape[:-1]
    count = math.prod(leading)
    classes = student_logits.shape[-1] if classes is None else classes
    weight = torch.ones(count, dtype=torch.float64)
    if row_weight is not None:
        weight = row_weight.double().reshape(-1)
    of_label = weight
    mask = weight != 0
    if labels is not None:
        labels = labels.reshape(-1)
        mask = mask & (labels != ignore_index)
        labels = torch.where(mask, labels, 0)
        if class_weight is not None:
            of_label = weight * class_weight.double()[labels]
    soft, hard = rows(
        student_logits,
        teacher_logits,
        teacher_indices,
        labels,
        class_weight,
        mask,
        temperature,
        divergence,
        beta,
        label_smoothing,
        classes,
        *(logit_scale[0], softcap[0] or 0.0, logit_scale[1], softcap[1] or 0.0),
        teacher_is_log_probabilities,
    )

    def reduced(values: Tensor, divisor: Tensor | float) -> Tensor:
        values = torch.where(mask, values * weight, 0.0)
        if reduction == "none":
            return values.reshape(leading)
        return values.sum() / (1 if reduction == "sum" else divisor)

    if scale_by_t_squared:
        soft = soft * temperature**2
    weight_of_all = torch.where(mask, weight, 0.0).sum()
    weight_of_labels = torch.where(mask, of_label, 0.0).sum()
    if denominator is not None:
        weight_of_all = weight_of_labels = denominator
    loss = reduced(soft, weight_of_all * (classes if reduction == "mean" else 1))
    if labels is None:
        return loss
    return alpha * loss + (1 - alpha) * reduced(hard, weight_of_labels)


def rows(
    student_logits: Tensor,
    teacher: Tensor,
    teacher_indices: Tensor | None,
    labels: Tensor | None,
    class_weight: Tensor | None,
    row_mask: Tensor | None,
    temperature: float,
    divergence: str,
    beta: float,
    label_smoothing: float,
    classes: int,
    student_scale: float,
    student_cap: float,
    teacher_scale: float,
    teacher_cap: float,
    teacher_is_log: bool,
) -> tuple[Tensor, Tensor]:
    """The operator `trine::softmax_kl`, but for what it saves: divergence and cross entropy of
    each row."""
    counted = torch.ones(math.prod(student_logits.shape[:-1]), dtype=torch.bool)
    if row_mask is not None:
        counted = row_mask.reshape(-1)
    counted = counted.to(student_logits.device)

    def rows_of(logits: Tensor, width: int) -> Tensor:
        logits = logits.double().reshape(counted.numel(), logits.shape[-1])[:, :width]
        return torch.where(counted[:, None], logits, 0.0)

    z = seen(rows_of(student_logits, classes), student_scale, student_cap)
    log_p = torch.log_softmax(z / temperature, -1)
    if teacher_indices is not None:
        log_p, log_q = bins(
            log_p,
            rows_of(teacher, teacher.shape[-1]),
            torch.where(counted[:, None], teacher_indices.reshape(counted.numel(), -1).long(), -1),
        )
    else:
        t = rows_of(teacher, classes)
        if not teacher_is_log:
            t = seen(t, teacher_scale, teacher_cap) / temperature
        log_q = torch.log_softmax(t, -1)
    soft = torch.where(counted, DIVERGENCES[divergence](log_p, log_q, beta), 0.0)
    if labels is None:
        return soft, soft.new_empty(0)
    hard = F.cross_entropy(
        z,
        torch.where(counted, labels.reshape(-1), 0),
        None if class_weight is None else class_weight.double(),
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return soft, torch.where(counted, hard, 0.0)


def seen(logits: Tensor, scale: float, cap: float) -> Tensor:
    return cap * torch.tanh(scale * logits / cap) if cap else scale * logits


def bins(log_p: Tensor, known: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's distributions over the classes of `indices` (-1: none) and
    the tail, which is all other classes together."""
    used = indices >= 0
    known = torch.where(used, known, IMPOSSIBLE)
    of_known = torch.where(used, log_p.gather(1, indices.clamp(min=0)), IMPOSSIBLE)
    without = torch.zeros(log_p.shape[0], log_p.shape[1] + 1, dtype=torch.bool, device=log_p.device)
    without.scatter_(1, torch.where(used, indices, log_p.shape[1]), True)
    without = without[:, :-1]
    of_tail = torch.where(without, IMPOSSIBLE, log_p).logsumexp(1)
    tail = (1 - known.exp().sum(1)).clamp(min=LEAST_TAIL).log()
    tail = torch.where(without.all(1), IMPOSSIBLE, tail)
    return torch.cat([of_known, of_tail[:, None]], 1), torch.cat([known, tail[:, None]], 1)


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
