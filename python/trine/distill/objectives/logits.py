"""Objectives that match what models put out: soft targets, logits, decoupled targets."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.distill.losses import IGNORED_LABEL
from trine.distill.objectives.base import Batch, Objective, Terms, View, look, look_at_both
from trine.distill.schedules import Scheduled, at_step
from trine.ops import softmax_kl

__all__ = ["DecoupledTargets", "Labels", "LogitDistance", "SoftTargets"]


def step_of(batch: Batch) -> int:
    """The number of updates so far, which the loop puts into the batch as "step"; 0 without."""
    return int(batch.get("step", 0))


def labels_of(batch: Batch, key: str, logits: Tensor, shift: bool) -> Tensor:
    """int64, one for each row of the logits; with `shift` that of the next token."""
    if key not in batch:
        raise ValueError(f"the batch has no '{key}'; add the class indices, -100 where none counts")
    labels = batch[key]
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"'{key}' must have a class index for each row of the logits, "
            f"{list(logits.shape[:-1])}; it has {list(labels.shape)}"
        )
    if not shift:
        return labels
    # The labels move, not the logits, of which that would make a copy.
    return torch.cat([labels[..., 1:], labels.new_full((*labels.shape[:-1], 1), IGNORED_LABEL)], -1)


class Labels(Objective):
    """The cross entropy with the labels: the mean over rows whose label is not -100; 0 where a
    batch has no such row.

    Args:
        labels: name in the batch, int64 [...] for logits [..., C].
        shift: the logits of a token are judged by the label of the next (causal language models).
        label_smoothing: as of `torch.nn.functional.cross_entropy`.
        student: name of the logits in the view.
        name: of the term.
    """

    def __init__(
        self,
        labels: str = "labels",
        *,
        shift: bool = False,
        label_smoothing: float = 0.0,
        student: str = "logits",
        name: str = "hard",
    ) -> None:
        super().__init__()
        self.labels, self.shift, self.label_smoothing = labels, shift, label_smoothing
        self.student, self.name = student, name

    def forward(self, student: View, teacher: View, batch: Batch) -> Terms:
        logits = look(student, self.student, "student")
        labels = labels_of(batch, self.labels, logits, self.shift)
        loss = self._cross_entropy(logits, labels)
        if "other_labels" in batch:  # inputs were mixed
            others = labels_of(batch, "other_labels", logits, self.shift)
            share = batch["share"]
            loss = share * loss + (1 - share) * self._cross_entropy(logits, others)
        return {self.name: loss}

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        total = F.cross_entropy(
            logits.flatten(0, -2).float(),
            labels.flatten(),
            ignore_index=IGNORED_LABEL,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        return total / (labels != IGNORED_LABEL).sum().clamp(min=1)


class SoftTargets(Objective):
    """The teacher's softened distribution (Hinton et al. 2015, arXiv:1503.02531): the mean over
    rows of T^2 * D(softmax(t / T_t), softmax(s / T)), on `trine.ops.softmax_kl`.

    It is 0 if and only if both models' logits are equal up to a constant in each row (and T_t = T).

    Args:
        temperature: T, a number or a function of the step.
        teacher_temperature: T_t where it is another one.
        divergence, beta: any that `softmax_kl` has: "forward_kl", "reverse_kl", "jsd" (GKD), the
            skewed ones (DistiLLM), "total_variation".
        labels: name in the batch of class indices; rows whose label is -100 (padding, prompts) do
            not count. None: all rows count.
        shift: as of `Labels`; needs `labels`.
        top_k: the teacher's view holds "top_log_probabilities" and "top_indices" [..., k], as a
            teacher cache does, in place of "logits"; what they lack to 1 is one tail bin. They
            were softened at the temperature when they were made.
        scale_by_t_squared: False leaves the factor T^2 out.
        student, teacher: names of the logits in the views.
        name: of the term.
    """

    def __init__(
        self,
        temperature: Scheduled = 4.0,
        *,
        teacher_temperature: Scheduled | None = None,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        labels: str | None = None,
        shift: bool = False,
        top_k: bool = False,
        scale_by_t_squared: bool = True,
        student: str = "logits",
        teacher: str = "logits",
        name: str = "soft",
    ) -> None:
        super().__init__()
        if shift and labels is None:
            raise ValueError("SoftTargets: shift moves the labels; name them with labels=")
        if top_k and teacher_temperature is not None:
            raise ValueError(
                "SoftTargets: top_k takes the teacher's probabilities as they were cached; "
                "leave teacher_temperature out"
            )
        self.temperature, self.teacher_temperature = temperature, teacher_temperature
        self.divergence, self.beta, self.top_k = divergence, beta, top_k
        self.labels, self.shift, self.name = labels, shift, name
        self.scale_by_t_squared = scale_by_t_squared
        self.student, self.teacher = student, teacher

    def forward(self, student: View, teacher: View, batch: Batch) -> Terms:
        logits = look(student, self.student, "student")
        step = step_of(batch)
        temperature = at_step(self.temperature, step)
        options = dict(
            divergence=self.divergence,
            beta=self.beta,
            scale_by_t_squared=self.scale_by_t_squared,
        )
        if self.labels is not None:
            labels = labels_of(batch, self.labels, logits, self.shift)
            options["row_weight"] = labels != IGNORED_LABEL
        if self.top_k:
            targets = look(teacher, "top_log_probabilities", "teacher").detach()
            options["teacher_indices"] = look(teacher, "top_indices", "teacher")
            cached_at = teacher.get("top_temperature", temperature)
            if cached_at != temperature:
                raise ValueError(
                    f"SoftTargets: the teacher's probabilities were cached at temperature "
                    f"{float(cached_at)}, and can't be had at {temperature}; use that one"
                )
        else:
            targets = look(teacher, self.teacher, "teacher").detach()
            if self.teacher_temperature is not None:
                ratio = temperature / at_step(self.teacher_temperature, step)
                options["logit_scale"] = (1.0, ratio)
        return {self.name: softmax_kl(logits, targets, temperature, **options)}


class LogitDistance(Objective):
    """The mean over rows and classes of (s - t)^2 (Ba & Caruana 2014, arXiv:1312.6184).

    Args:
        centred: take each row's mean off first, so that only differences of logits count.
        labels: as of `SoftTargets`.
        name: of the term.
    """

    def __init__(
        self, *, centred: bool = False, labels: str | None = None, name: str = "logits"
    ) -> None:
        super().__init__()
        self.centred, self.labels, self.name = centred, labels, name

    def forward(self, student: View, teacher: View, batch: Batch) -> Terms:
        difference = torch.sub(*look_at_both(student, teacher, "logits", "logits"))
        if self.centred:
            difference = difference - difference.mean(-1, keepdim=True)
        of_rows = difference.square().mean(-1)
        if self.labels is None:
            return {self.name: of_rows.mean()}
        counted = labels_of(batch, self.labels, difference, shift=False) != IGNORED_LABEL
        return {self.name: torch.where(counted, of_rows, 0.0).sum() / counted.sum()}


class DecoupledTargets(Objective):
    """DKD (Zhao et al. 2022, arXiv:2203.08679): the mean over rows of T^2 * (alpha * TCKD +
    beta * NCKD).

    With q_y the probability of the true class, TCKD = KL((q_y, 1 - q_y)_T || (q_y, 1 - q_y)_S);
    NCKD is the KL divergence over the other classes, renormalised. Soft targets weigh NCKD by the
    teacher's 1 - q_y, which vanishes where it is sure; here it does not.

    Args:
        temperature: T, a number or a function of the step.
        alpha, beta: the paper's weights, 1 and 8 for most pairs.
        labels: name in the batch of the true classes; rows of -100 do not count.
        name: of the term.
    """

    def __init__(
        self,
        temperature: Scheduled = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        *,
        labels: str = "labels",
        name: str = "decoupled",
    ) -> None:
        super().__init__()
        self.temperature, self.alpha, self.beta = temperature, alpha, beta
        self.labels, self.name = labels, name

    def forward(self, student: View, teacher: View, batch: Batch) -> Terms:
        s, t = (z.flatten(0, -2) for z in look_at_both(student, teacher, "logits", "logits"))
        labels = labels_of(batch, self.labels, look(student, "logits", "student"), shift=False)
        counted = (labels != IGNORED_LABEL).flatten()
        true = torch.where(counted, labels.flatten(), 0)[:, None]
        temperature = at_step(self.temperature, step_of(batch))
        others = [z.scatter(1, true, -torch.inf) for z in (s, t)]
        # As logits of two classes: the true one and all others together.
        binary = [
            torch.stack(
                [z.gather(1, true)[:, 0] / temperature, (o / temperature).logsumexp(1)], dim=1
            )
            for z, o in zip((s, t), others, strict=True)
        ]
        of_true_class = temperature**2 * softmax_kl(
            *(z.float() for z in binary), row_weight=counted
        )
        of_others = softmax_kl(*(o.float() for o in others), temperature, row_weight=counted)
        return {self.name: self.alpha * of_true_class + self.beta * of_others}
