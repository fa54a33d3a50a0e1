"""Contrastive representation distillation."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trine.distill.objectives.base import Batch, Objective, Terms, View, look_at_both

__all__ = ["ContrastiveRepresentation"]


class ContrastiveRepresentation(Objective):
    """CRD (Tian et al. 2020, arXiv:1910.10699): noise-contrastive estimation with memory banks.

    Both models' features are projected to `width` columns and normalised, giving s and t. Two banks
    hold the last such vectors of every example of the training set. The student's vector of example
    i is told from K others of the teacher's bank, and the teacher's vector, with a learned
    projection, from K of the student's bank:

        h(a, b) = u / (u + K / N),  u = exp(a . b / temperature) / Z
        loss = -mean over i of [log h(s_i, t_i) + sum over negatives j of log(1 - h(s_i, t_j))]
               - the same with the roles exchanged

    Z is fixed when it is first called, as in the paper's code: N times the mean of the exponentials
    of that call. Negatives are drawn evenly from all other examples with torch's random numbers.
    After the loss is computed the banks take momentum * old + (1 - momentum) * new, normalised; of
    several processes all take what each has seen.

    Args:
        student, teacher: names in the views, of features [B, ...]; the rest is flattened.
        student_width, teacher_width: their columns.
        examples: N, in the training set; the batch says which ones it holds.
        negatives: K.
        width, temperature, momentum: the paper's 128, 0.07 and 0.5.
        index: name in the batch of int64 [B], each example's number from 0 to N - 1.
        name: of the term.
    """

    def __init__(
        self,
        student: str,
        teacher: str,
        student_width: int,
        teacher_width: int,
        examples: int,
        *,
        negatives: int = 16384,
        width: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
        index: str = "index",
        name: str = "contrastive",
    ) -> None:
        super().__init__()
        if examples < 2 or negatives < 1:
            raise ValueError(
                "ContrastiveRepresentation: needs two examples and one negative at least, it has "
                f"{examples} and {negatives}"
            )
        self.keys, self.examples, self.negatives = (student, teacher), examples, negatives
        self.temperature, self.momentum = temperature, momentum
        self.index, self.name = index, name
        self.project_student = nn.Linear(student_width, width)
        self.project_teacher = nn.Linear(teacher_width, width)
        for bank in ("student_bank", "teacher_bank"):
            self.register_buffer(bank, F.normalize(torch.randn(examples, width), dim=1))
        # Z of the student's vectors against the teacher's bank, and of the teacher's; 0: not known.
        self.register_buffer("normalisers", torch.zeros(2))

    def forward(self, student: View, teacher: View, batch: Batch) -> Terms:
        of_student, of_teacher = look_at_both(student, teacher, *self.keys)
        if self.index not in batch:
            raise ValueError(
                f"the batch has no '{self.index}'; add each example's number in the training set"
            )
        index = batch[self.index]
        s = F.normalize(self.project_student(of_student.flatten(1)), dim=1)
        t = F.normalize(self.project_teacher(of_teacher.flatten(1)), dim=1)
        shape = (len(index), self.negatives)
        drawn = torch.randint(self.examples - 1, shape, device=index.device)
        others = drawn + (drawn >= index[:, None])  # all but the example itself, evenly
        rows = torch.cat([index[:, None], others], 1)
        loss = self._told_apart(s, self.teacher_bank, rows, 0)
        loss = loss + self._told_apart(t, self.student_bank, rows, 1)
        if self.training:
            self._remember(self.student_bank, index, s)
            self._remember(self.teacher_bank, index, t)
        return {self.name: loss}

    def _told_apart(self, vectors: Tensor, bank: Tensor, rows: Tensor, which: int) -> Tensor:
        """Column 0 of `rows` is the bank's true partner."""
        products = torch.einsum("bd,bkd->bk", vectors, bank[rows])
        exponentials = torch.exp(products / self.temperature)
        with torch.no_grad():
            known = self.normalisers[which]
            first = torch.stack(_of_all_processes(exponentials.mean())).mean() * self.examples
            self.normalisers[which] = torch.where(known > 0, known, first)
        u = exponentials / self.normalisers[which].clone()
        noise = self.negatives / self.examples
        right = torch.log(u[:, 0] / (u[:, 0] + noise))
        wrong = torch.log(noise / (u[:, 1:] + noise)).sum(1)
        return -(right + wrong).mean()

    @torch.no_grad()
    def _remember(self, bank: Tensor, index: Tensor, vectors: Tensor) -> None:
        index, vectors = (torch.cat(_of_all_processes(rows)) for rows in (index, vectors))
        mixed = self.momentum * bank[index] + (1 - self.momentum) * vectors.to(bank.dtype)
        bank[index] = F.normalize(mixed, dim=1)


def _of_all_processes(tensor: Tensor) -> list[Tensor]:
    """Each process's, which have one shape; in the order of their ranks."""
    if not dist.is_initialized():
        return [tensor]
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return gathered
