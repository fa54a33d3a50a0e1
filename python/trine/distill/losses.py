"""Losses that train a student on a teacher's outputs."""

from torch import Tensor

from trine.ops import softmax_kl

__all__ = ["IGNORED_LABEL", "distillation_loss"]

IGNORED_LABEL = -100  # the default `ignore_index` of torch.nn.functional.cross_entropy


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    alpha: float = 0.7,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
) -> Tensor:
    """(1 - alpha) * cross_entropy(student, labels) + alpha * T^2 * KL(p_teacher || p_student).

    The two terms are means over the same rows: those whose label is not -100 (padding, masked
    tokens). p = softmax(logits / T); the factor T^2 keeps the two terms' gradients in proportion
    when T changes (Hinton et al. 2015, arXiv:1503.02531). The teacher is a constant: no gradient
    flows to it. A term whose weight is 0 adds nothing, even where it is infinite or NaN.
    `trine.ops.softmax_kl`, which computes it, has more options.

    Args:
        student_logits: [..., C], float32, bfloat16 or float16.
        teacher_logits: the same shape; its dtype may differ.
        labels: int64 class indices [...], or -100 for rows that do not count.
        temperature: T > 0, for both softmaxes of the KL term; the cross entropy has none.
        alpha: weight of the teacher, from 0 (labels alone) to 1 (teacher alone).
        divergence: in the place of that KL, any that `trine.ops.softmax_kl` has.
        beta: of the divergences that mix teacher and student.

    Returns:
        A float32 scalar, computed in fp32 also under autocast. NaN if no row counts, as in
        `cross_entropy`.

    Raises:
        ValueError: shapes or dtypes that do not fit, a temperature that is not positive and finite,
            alpha outside [0, 1], an unknown divergence, beta outside (0, 1).
        IndexError: a label outside [0, C) other than -100 (on the CPU).
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"distillation_loss: alpha must lie in [0, 1], it is {alpha}")
    return softmax_kl(
        student_logits,
        teacher_logits.detach(),
        temperature,
        labels=labels,
        alpha=alpha,
        ignore_index=IGNORED_LABEL,
        divergence=divergence,
        beta=beta,
    )
