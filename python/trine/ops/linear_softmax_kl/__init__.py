"""`softmax_kl` of two linear layers' logits, which never exist as a whole."""

import torch
from torch import Tensor

from trine.ops._checks import FLOAT_DTYPES, in_forward_mode, refuse_tangents
from trine.ops.linear_softmax_kl.heads import dtype_of_products
from trine.ops.linear_softmax_kl.operator import op
from trine.ops.softmax_kl.loss import Loss, LossTerms, pair

__all__ = ["linear_softmax_kl"]

_OP = "linear_softmax_kl"
_CPU_MEMORY_LIMIT = 64 << 20  # bytes
_GPU_MEMORY_LIMIT = 512 << 20


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
    divergence: str = "forward_kl",
    beta: float = 0.5,
    labels: Tensor | None = None,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    teacher_indices: Tensor | None = None,
    teacher_is_log_probabilities: bool = False,
    classes: int | None = None,
    softcap: float | tuple[float | None, float | None] | None = None,
    logit_scale: float | tuple[float, float] = 1.0,
    row_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    scale_by_t_squared: bool = True,
    return_terms: bool = False,
    memory_limit: int | None = None,
) -> Tensor | LossTerms:
    """`softmax_kl(student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T, ...)`, of
    whose logits only a few rows exist at a time.

    It takes the last linear layers of both models and what goes into them: with a vocabulary of
    128256 the logits of 8192 tokens, their probabilities and gradients are gigabytes each. For a
    scalar loss the gradients are made together with it: the forward call takes nearly all the time,
    backward scales them. `torch.no_grad()` leaves them out. The teacher is a constant: no gradient
    flows to it, whether it requires one or not.

    Args:
        student_hidden: [..., H], float32, bfloat16 or float16.
        student_weight: [C, H], as of `nn.Linear`; of the same dtype, except under autocast, which
            decides on the dtype of the products as it does for `F.linear`. Products of 16 bits are
            computed in fp32 on a CPU that has no instructions for them.
        teacher_hidden: [..., H'], of any dtype and width; or, where there is no teacher_weight,
            what `softmax_kl` takes for a teacher: logits, log-probabilities, or some of them.
        teacher_weight: [C', H'] or None.
        student_bias, teacher_bias: [C], [C'].
        memory_limit: bytes for everything that is neither argument nor result (a loss per row, the
            gradients); 64 MB on the CPU, 512 MB elsewhere. As many rows are taken at a time as fit,
            and one at least. What the libraries of matrix products take inside is not counted.
        temperature, reduction, ...: those of `softmax_kl`, which explains them. `classes` is needed
            where C and C' differ.

    Rows that do not count (of weight 0, or with the label `ignore_index`) are left out of the
    products on the CPU; a GPU computes them with zeros in their place, because only the CPU can
    know their number without waiting.

    The weight's gradient is summed in fp32. Where the weight has 16 bits, the rows do not fit into
    one chunk, and memory_limit is less than twice such a sum (8 bytes an element), the logits of
    all chunks but the last are computed twice: up to six products instead of four. Beside
    teacher_indices the sum is then rounded after each chunk instead. In float16 the gradients wait
    for the backward call, whose scale keeps them above the least that float16 holds; so do those of
    "none": two more products. A second backward call (`retain_graph=True`) computes them again,
    because the first one hands its memory on. Second derivatives (`create_graph=True`) come from
    plain PyTorch in float64, which stores all logits.

    Returns:
        As `softmax_kl`.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.
        IndexError: a label outside [0, C), a teacher index outside [-1, C) (on the CPU).
    """
    if in_forward_mode():
        refuse_tangents(_OP, student_hidden, student_weight, student_bias, teacher_hidden)
    student = (student_hidden, student_weight, student_bias)
    teacher = (teacher_hidden, teacher_weight, teacher_bias)
    is_log = teacher_is_log_probabilities or teacher_indices is not None
    classes = _classes(student, teacher, teacher_indices, is_log, classes)
    if memory_limit is None:
        on_cpu = student_hidden.device.type == "cpu"
        memory_limit = _CPU_MEMORY_LIMIT if on_cpu else _GPU_MEMORY_LIMIT
    if memory_limit <= 0:
        raise ValueError(f"{_OP}: memory_limit must be positive, it is {memory_limit}")
    loss = Loss(
        _OP,
        student_hidden.shape[:-1],
        classes,
        temperature=temperature,
        reduction=reduction,
        labels=labels,
        alpha=alpha,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        ignore_index=ignore_index,
        row_weight=row_weight,
        denominator=denominator,
        scale_by_t_squared=scale_by_t_squared,
        return_terms=return_terms,
    )
    student_scale, teacher_scale = pair(logit_scale, 1.0)
    student_cap, teacher_cap = pair(softcap, 0.0)
    if is_log:
        teacher_scale, teacher_cap = 1.0, 0.0
    student_dtype = _dtype_of_linear(student_weight)
    teacher_dtype = _dtype_of_linear(teacher_hidden if teacher_weight is None else teacher_weight)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in student]
    # In fp16 the gradient for an upstream one of 1 would vanish.
    at_once = reduction != "none" and loss.rows > 0 and student_dtype != torch.float16
    at_once = at_once and any(wanted)
    total, soft, hard, *_ = op(
        _flat(student_hidden),
        student_weight,
        student_bias,
        _flat(teacher_hidden).detach(),
        None if teacher_weight is None else teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        None if teacher_indices is None else _flat(teacher_indices),
        loss.labels,
        loss.class_weight,
        loss.mask,
        *(loss.coefficients(student_hidden.device) if at_once else (None, None)),
        temperature,
        divergence,
        beta,
        label_smoothing,
        classes,
        *(student_scale, student_cap, teacher_scale, teacher_cap),
        teacher_is_log_probabilities,
        dtype_of_products(student_weight, student_dtype),
        dtype_of_products(teacher_weight, teacher_dtype),
        *(wanted if at_once else [False] * 3),
        memory_limit,
    )
    if not at_once:
        return loss.of(soft, hard)
    if not return_terms:
        return total
    return loss.of(soft.detach(), hard.detach())._replace(loss=total)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _dtype_of_linear(weight: Tensor) -> torch.dtype:
    """That of F.linear."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _classes(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor | None, Tensor | None],
    indices: Tensor | None,
    is_log: bool,
    classes: int | None,
) -> int:
    """Raise ValueError unless the tensors fit together."""
    _check_head("student", *student)
    _check_head("teacher", *teacher)
    (hidden, weight, _), (teacher_hidden, teacher_weight, _) = student, teacher
    if hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"{_OP}: student_hidden and teacher_hidden must have the same leading dimensions; they "
            f"have {list(hidden.shape)} and {list(teacher_hidden.shape)}"
        )
    if is_log and teacher_weight is not None:
        raise ValueError(
            f"{_OP}: log-probabilities of the teacher take the place of teacher_hidden, without a "
            "teacher_weight"
        )
    of_student = of_teacher = weight.shape[0]
    if indices is None:
        of_teacher = teacher_hidden.shape[-1] if teacher_weight is None else teacher_weight.shape[0]
    elif indices.shape != teacher_hidden.shape:
        raise ValueError(
            f"{_OP}: teacher_indices must have the shape of the teacher's log-probabilities, "
            f"{list(teacher_hidden.shape)}; theirs is {list(indices.shape)}"
        )
    if classes is None:
        if of_student != of_teacher:
            raise ValueError(
                f"{_OP}: student and teacher must have the same number of classes, or `classes` "
                f"must tell how many are none of padding; they have {of_student} and {of_teacher}"
            )
        return of_student
    most = min(of_student, of_teacher)
    if not 0 < classes <= most:
        raise ValueError(f"{_OP}: classes must lie in [1, {most}]; it is {classes}")
    return classes


def _check_head(who: str, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    named = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, tensor in named.items():
        if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{_OP}: {who}_{name} must be float32, bfloat16 or float16, it is {tensor.dtype}; "
                "convert it with .to()"
            )
    if hidden.dim() == 0:
        raise ValueError(f"{_OP}: {who}_hidden must have at least one dimension; it is a scalar")
    if weight is None:
        if bias is not None:
            raise ValueError(f"{_OP}: a {who}_bias needs a {who}_weight")
        return
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{_OP}: {who}_weight must be [classes, {hidden.shape[-1]}], for {who}_hidden is "
            f"{list(hidden.shape)}; its shape is {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{_OP}: {who}_bias must be [{weight.shape[0]}]; its shape is {list(bias.shape)}"
        )
    autocast = torch.is_autocast_enabled(weight.device.type)
    if not autocast and len({t.dtype for t in named.values() if t is not None}) > 1:
        dtypes = ", ".join(f"{who}_{n} {t.dtype}" for n, t in named.items() if t is not None)
        raise ValueError(
            f"{_OP}: a model's tensors must have one dtype, outside autocast: {dtypes}"
        )
