"""From two losses of each row to the loss: factors, weights and means, on vectors of a value a row,
the same on every backend."""

from typing import NamedTuple

import torch
from torch import Tensor


class LossTerms(NamedTuple):
    """The loss, and the two terms of which it is alpha and 1 - alpha; these without a gradient."""

    loss: Tensor
    soft: Tensor
    hard: Tensor | None


class Loss:
    """A row's soft loss is its divergence, the hard one its cross entropy; both linear in them.

    `mask`, `labels` and `class_weight` are what the operator takes; None where it need not."""

    def __init__(
        self,
        op: str,
        leading: torch.Size,
        classes: int,
        *,
        temperature: float,
        reduction: str,
        labels: Tensor | None,
        alpha: float,
        label_smoothing: float,
        class_weight: Tensor | None,
        ignore_index: int,
        row_weight: Tensor | None,
        denominator: float | Tensor | None,
        scale_by_t_squared: bool,
        return_terms: bool,
    ) -> None:
        _check_reduction(op, reduction, denominator)
        _check_labels(op, leading, labels, alpha, class_weight, label_smoothing)
        self.leading, self.reduction, self.denominator = leading, reduction, denominator
        self.return_terms = return_terms
        self.rows = 1
        for size in leading:
            self.rows = self.rows * size
        self.mask = self.labels = self.class_weight = self.row_weight = None
        if row_weight is not None:
            if row_weight.shape != leading:
                raise ValueError(
                    f"{op}: row_weight must have the leading dimensions of the logits, "
                    f"{list(leading)}; its shape is {list(row_weight.shape)}"
                )
            self.row_weight = row_weight.detach().float().reshape(-1)
            self.mask = self.row_weight != 0
        self.alpha = 1.0 if labels is None else alpha
        if labels is not None:
            labels = labels.reshape(-1)
            counted = labels != ignore_index
            self.mask = counted if self.mask is None else self.mask & counted
            if alpha < 1 or return_terms:
                self.labels = labels
                if class_weight is not None:
                    self.class_weight = class_weight.detach().float().contiguous()
        self.squared = temperature**2 if scale_by_t_squared else 1.0
        self.of_mean = classes if reduction == "mean" else 1

    def of(self, soft: Tensor, hard: Tensor) -> Tensor | LossTerms:
        soft = self._reduced(soft * self.squared, self._soft_divisor())
        hard = None if self.labels is None else self._reduced(hard, self._hard_divisor())
        if self.alpha == 1:
            loss = soft
        else:
            loss = (1 - self.alpha) * hard
            if self.alpha > 0:
                loss = self.alpha * soft + loss
        if not self.return_terms:
            return loss
        return LossTerms(loss, soft.detach(), None if hard is None else hard.detach())

    def coefficients(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """A scalar loss is the sum of these times the rows' soft and hard losses."""
        weight = self.row_weight
        if weight is None:
            weight = torch.ones(self.rows, device=device)
        soft = weight * (self.alpha * self.squared / self._soft_divisor())
        if self.labels is None:
            return soft, None
        return soft, weight * ((1 - self.alpha) / self._hard_divisor())

    def _reduced(self, losses: Tensor, divisor: float | Tensor) -> Tensor:
        if self.row_weight is not None:  # 0 times the 0 of a row that is not read
            losses = losses * self.row_weight
        if self.reduction == "none":
            return losses.reshape(self.leading)
        return sum_of(losses) / divisor

    def _soft_divisor(self) -> float | Tensor:
        return self._divisor(None) * self.of_mean

    def _hard_divisor(self) -> float | Tensor:
        return self._divisor(self.class_weight)

    def _divisor(self, class_weight: Tensor | None) -> float | Tensor:
        """Of the sum over rows: a mean counts a row by its weight, and by that of its label."""
        if self.reduction in ("sum", "none"):
            return 1.0
        if self.denominator is not None:
            return self.denominator
        if self.mask is None and class_weight is None:
            return self.rows
        count = self.mask.float() if self.row_weight is None else self.row_weight * self.mask
        if class_weight is not None:
            count = count * class_weight[torch.where(self.mask, self.labels, 0)]
        return sum_of(count)


def sum_of(values: Tensor) -> Tensor:
    """Of a vector; its rounding does not depend on the number of threads. torch cuts a single sum
    of 32768 values or more among them; of two sums each is one thread's."""
    return values.expand(2, -1).sum(1)[0]


def pair(value, none: float) -> tuple[float, float]:
    """Of the student and the teacher."""
    of_student, of_teacher = value if isinstance(value, (tuple, list)) else (value, value)
    return (
        none if of_student is None else float(of_student),
        none if of_teacher is None else float(of_teacher),
    )


def _check_reduction(op: str, reduction: str, denominator: float | Tensor | None) -> None:
    if reduction not in ("batchmean", "mean", "sum", "none"):
        raise ValueError(
            f"{op}: reduction must be 'batchmean', 'sum', 'mean' or 'none', it is '{reduction}'"
        )
    if denominator is None:
        return
    if reduction != "batchmean":
        raise ValueError(
            f"{op}: a denominator takes the place of 'batchmean', the reduction is '{reduction}'"
        )
    if not isinstance(denominator, Tensor) and not denominator > 0:
        raise ValueError(f"{op}: the denominator must be positive, it is {denominator}")


def _check_labels(
    op: str,
    leading: torch.Size,
    labels: Tensor | None,
    alpha: float,
    class_weight: Tensor | None,
    label_smoothing: float,
) -> None:
    if labels is None:
        if class_weight is not None or label_smoothing:
            raise ValueError(
                f"{op}: class_weight and label_smoothing are of the cross entropy, which needs "
                "labels"
            )
        return
    if labels.dtype != torch.int64 or labels.shape != leading:
        raise ValueError(
            f"{op}: labels must be int64 class indices of shape {list(leading)}; they are "
            f"{labels.dtype} {list(labels.shape)}"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"{op}: alpha must lie in [0, 1], it is {alpha}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must lie in [0, 1], it is {label_smoothing}")
