"""Models that learn from each other (online, mutual), and layers from deeper ones (self)."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trine.distill.losses import IGNORED_LABEL
from trine.distill.objectives.base import Batch, Objective, Terms, View, look, same_width
from trine.distill.objectives.logits import Scheduled, at_step, labels_of, step_of
from trine.ops import softmax_kl

__all__ = ["Cohort", "Exits", "LearnTogether"]


class Cohort(nn.Module):
    """Several models called as one; its output is their logits, [models, ..., C].

    Args:
        models: with the same inputs and classes. Each returns its logits, or has them as `logits`.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, *args, **kwargs) -> Tensor:
        outputs = (model(*args, **kwargs) for model in self.models)
        return torch.stack([o if isinstance(o, Tensor) else o.logits for o in outputs])


class LearnTogether(Objective):
    """Deep mutual learning (Zhang et al. 2018, arXiv:1706.00384), or online distillation.

    For each model i of a `Cohort` two terms, "hard" the sum over models of the cross entropy with
    the labels, and "soft" the sum over models of the mean, over those j that i learns from, of
    T^2 * KL(p_j || p_i), where p_j is a constant.

    Args:
        learns_from: for each model the numbers of those it learns from. [[1], [0]] is mutual
            learning of two, [[], [0]] lets model 0 be an online teacher: trained on labels
            meanwhile, and imitated by model 1. None: everybody learns from all others.
        temperature: T, a number or a function of the step; 1 in the paper.
        labels: name in the batch; rows of -100 do not count in "hard", but do in "soft".
    """

    def __init__(
        self,
        learns_from: Sequence[Sequence[int]] | None = None,
        temperature: Scheduled = 1.0,
        *,
        labels: str = "labels",
    ) -> None:
        super().__init__()
        self.learns_from, self.temperature, self.labels = learns_from, temperature, labels

    def forward(self, student: View, teacher: View, batch: Batch) -> Terms:
        logits = look(student, "logits", "student")
        models = range(logits.shape[0])
        learns_from = self.learns_from or [[j for j in models if j != i] for i in models]
        if len(learns_from) != len(models) or not all(
            j in models and j != i for i, others in enumerate(learns_from) for j in others
        ):
            raise ValueError(
                f"LearnTogether: learns_from must say for each of the {len(models)} models which "
                f"others it learns from; it is {learns_from}"
            )
        temperature = at_step(self.temperature, step_of(batch))
        labels = labels_of(batch, self.labels, logits[0], shift=False).flatten()
        hard, soft = [], []
        for i, others in enumerate(learns_from):
            rows = logits[i].flatten(0, -2)
            hard.append(F.cross_entropy(rows.float(), labels, ignore_index=IGNORED_LABEL))
            if others:
                of_each = [softmax_kl(logits[i], logits[j].detach(), temperature) for j in others]
                soft.append(torch.stack(of_each).mean())
        if not soft:
            raise ValueError("LearnTogether: nobody learns from anybody")
        return {"hard": torch.stack(hard).sum(), "soft": torch.stack(soft).sum()}


class Exits(Objective):
    """Be your own teacher (Zhang et al. 2019, arXiv:1905.08094): the deepest output teaches shallow
    exits of the same network.

    An exit is a captured layer and a head of its own, trained with the network. Terms are means
    over exits: "exit_hard", of their cross entropy with the labels; "exit_soft", of
    T^2 * KL(p_deepest || p_exit); and with `deepest` "exit_hint", of the mean of
    (F_exit - F_deepest)^2. What the deepest layers compute is a constant in the last two.

    Args:
        heads: by name in the student's view, what makes logits of that layer. A head that returns
            (logits, features) takes part in the hint.
        deepest: name in the student's view of the last features, of the shape that heads return.
        temperature: T, a number or a function of the step.
        labels: name in the batch of int64 [B]; rows of -100 count in the soft term only.

    The network's own cross entropy is the objective `Labels`.
    """

    def __init__(
        self,
        heads: Mapping[str, nn.Module],
        *,
        deepest: str | None = None,
        temperature: Scheduled = 3.0,
        labels: str = "labels",
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(heads)
        self.deepest, self.temperature, self.labels = deepest, temperature, labels

    def forward(self, student: View, teacher: View, batch: Batch) -> Terms:
        temperature = at_step(self.temperature, step_of(batch))
        targets = look(student, "logits", "student").detach()
        labels = labels_of(batch, self.labels, targets, shift=False)
        hard, soft, hint = [], [], []
        for layer in self.heads:
            logits, features = self.exit(student, layer)
            hard.append(F.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL))
            soft.append(softmax_kl(logits, targets, temperature))
            if self.deepest is not None:
                of_deepest = look(student, self.deepest, "student").detach()
                same_width(features, of_deepest, 1, "Exits")
                hint.append(F.mse_loss(features.float(), of_deepest.float()))
        terms = {"exit_hard": torch.stack(hard).mean(), "exit_soft": torch.stack(soft).mean()}
        if hint:
            terms["exit_hint"] = torch.stack(hint).mean()
        return terms

    def exit(self, student: View, layer: str) -> tuple[Tensor, Tensor | None]:
        """The logits of an exit, and the features of its hint."""
        made = self.heads[layer](look(student, layer, "student"))
        if isinstance(made, Tensor):
            if self.deepest is not None:
                raise ValueError(
                    f"Exits: the head of '{layer}' must return (logits, features) for the hint "
                    f"towards '{self.deepest}'"
                )
            return made, None
        return made
