"""Objectives that match where models look: spatial attention, attention maps, self-relations."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trine.distill.objectives.base import (
    Batch,
    Objective,
    Terms,
    View,
    counted_tokens,
    look_at_both,
    mean_of_counted,
    pooled_to_smaller,
)
from trine.ops import softmax_kl

__all__ = ["AttentionMaps", "AttentionTransfer", "SelfRelations"]


class AttentionTransfer(Objective):
    """AT (Zagoruyko & Komodakis 2017, arXiv:1612.03928): the mean over examples, summed over the
    pairs of layers, of |Q_S / |Q_S| - Q_T / |Q_T||, with Q = sum over channels of |F|^p and L2
    norms.

    Unchanged by the order of channels; student and teacher may differ in their number. Maps of
    different sizes are averaged to the smaller one.

    Args:
        layers: pairs of names (student's, teacher's), of maps [B, C, H, W].
        p: the power, 2 in the paper.
        name: of the term.
    """

    def __init__(
        self, layers: Sequence[tuple[str, str]], *, p: float = 2, name: str = "attention_transfer"
    ) -> None:
        super().__init__()
        self.layers, self.p, self.name = list(layers), p, name

    def forward(self, student: View, teacher: View, batch: Batch) -> Terms:
        distances = []
        for pair in self.layers:
            maps = pooled_to_smaller(*look_at_both(student, teacher, *pair))
            of_student, of_teacher = (
                F.normalize(m.abs().pow(self.p).sum(1).flatten(1), dim=1) for m in maps
            )
            distances.append(torch.linalg.vector_norm(of_student - of_teacher, dim=1).mean())
        return {self.name: torch.stack(distances).sum()}


class AttentionMaps(Objective):
    """Attention maps of transformers, layer by layer; the mean over the mapped pairs of layers.

    With "mse" the mean over heads and pairs of real tokens of (A_S - A_T)^2 (TinyBERT, Jiao et al.
    2020, arXiv:1909.10351), of maps before or after the softmax: what the views hold. With "kl" the
    mean over heads and real tokens of KL(A_T || A_S), of maps after it.

    Where the student has fewer heads, and their number divides the teacher's, each head answers for
    the mean of its share of the teacher's heads, in order; other numbers are an error.

    Args:
        layers: pairs of names (student's, teacher's), of maps [B, heads, L, L].
        loss: "mse" or "kl".
        mask: name in the batch of what tells padding (0) from tokens [B, L]; None: all count.
        name: of the term.
    """

    def __init__(
        self,
        layers: Sequence[tuple[str, str]],
        *,
        loss: str = "mse",
        mask: str | None = "attention_mask",
        name: str = "attention",
    ) -> None:
        super().__init__()
        if loss not in ("mse", "kl"):
            raise ValueError(f"AttentionMaps: loss must be 'mse' or 'kl', it is '{loss}'")
        self.layers, self.loss, self.mask, self.name = list(layers), loss, mask, name

    def forward(self, student: View, teacher: View, batch: Batch) -> Terms:
        losses = []
        for pair in self.layers:
            of_student, of_teacher = look_at_both(student, teacher, *pair)
            of_teacher = _shared_out(of_teacher, of_student.shape[1])
            batch_size, _, tokens, _ = of_student.shape
            counted = counted_tokens(batch, self.mask, torch.Size((batch_size, tokens)))
            losses.append(self._of_layer(of_student, of_teacher, counted))
        return {self.name: torch.stack(losses).mean()}

    def _of_layer(self, student: Tensor, teacher: Tensor, counted: Tensor | None) -> Tensor:
        if self.loss == "mse":
            if counted is not None:
                counted = counted[:, None, :, None] & counted[:, None, None, :]
                counted = counted.expand(student.shape)
            return mean_of_counted((student - teacher).square(), counted)
        # Of what the student gives no weight at all the smallest number stands for 0.
        tiny = torch.finfo(student.dtype).tiny
        terms = torch.xlogy(teacher, teacher) - teacher * student.clamp(min=tiny).log()
        if counted is not None:
            counted = counted[:, None, :].expand(student.shape[:3])
        return mean_of_counted(terms.sum(-1), counted)


def _shared_out(maps: Tensor, heads: int) -> Tensor:
    """The means of as many groups of the teacher's heads."""
    if maps.shape[1] % heads:
        raise ValueError(
            f"AttentionMaps: the student's {heads} heads do not divide the teacher's "
            f"{maps.shape[1]}; choose a divisor, or match relations instead (SelfRelations)"
        )
    return maps.unflatten(1, (heads, -1)).mean(2)


class SelfRelations(Objective):
    """MiniLM (Wang et al. 2020, arXiv:2002.10957; any number of heads: arXiv:2012.15828): for each
    relation (a, b) the mean over relation heads and real tokens of KL(R_T || R_S), with
    R = softmax(A_a A_b^T / sqrt(d)); the term is the sum over relations.

    A are the queries, keys or values of a layer, [B, L, width], cut into `heads` relation heads of
    d = width / heads columns: student and teacher may differ in width and in attention heads.

    Args:
        student, teacher: {"q": name, "k": name, "v": name} in the views, as far as they are needed.
        heads: of the relations; must divide both widths.
        relations: pairs of those letters: "qk" and "vv" are MiniLM's, "qq", "kk", "vv" the second
            paper's.
        mask: name in the batch of what tells padding (0) from tokens [B, L]; None: all count.
        name: of the term.
    """

    def __init__(
        self,
        student: dict[str, str],
        teacher: dict[str, str],
        heads: int,
        relations: Sequence[str] = ("qk", "vv"),
        *,
        mask: str | None = "attention_mask",
        name: str = "relations",
    ) -> None:
        super().__init__()
        for relation in relations:
            if len(relation) != 2 or not set(relation) <= set(student) & set(teacher):
                raise ValueError(
                    f"SelfRelations: the relation '{relation}' needs two of the letters that both "
                    f"models have names for: {''.join(sorted(set(student) & set(teacher)))}"
                )
        self.student, self.teacher = dict(student), dict(teacher)
        self.heads, self.relations, self.mask, self.name = heads, list(relations), mask, name

    def forward(self, student: View, teacher: View, batch: Batch) -> Terms:
        seen = {
            letter: look_at_both(student, teacher, self.student[letter], self.teacher[letter])
            for letter in sorted(set("".join(self.relations)))
        }
        total = torch.zeros((), device=next(iter(seen.values()))[0].device)
        for first, second in self.relations:
            of_student, of_teacher = (
                self._scores(a, b) for a, b in zip(seen[first], seen[second], strict=True)
            )
            counted = counted_tokens(
                batch, self.mask, torch.Size((of_student.shape[0], of_student.shape[-1]))
            )
            row_weight = None
            if counted is not None:
                padding = ~counted[:, None, None, :]
                of_student, of_teacher = (
                    scores.masked_fill(padding, -math.inf) for scores in (of_student, of_teacher)
                )
                row_weight = counted[:, None, :].expand(of_student.shape[:3])
            total = total + softmax_kl(of_student, of_teacher, row_weight=row_weight)
        return {self.name: total}

    def _scores(self, first: Tensor, second: Tensor) -> Tensor:
        """[B, heads, L, L], before the softmax."""
        width = first.shape[-1]
        if width % self.heads:
            raise ValueError(
                f"SelfRelations: {self.heads} heads do not divide the width {width}; choose "
                "a divisor of both models' widths"
            )
        first, second = (
            a.unflatten(-1, (self.heads, -1)).transpose(1, 2).float() for a in (first, second)
        )
        return first @ second.transpose(-1, -2) / math.sqrt(width // self.heads)
