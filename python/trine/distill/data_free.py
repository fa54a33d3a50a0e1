"""Distillation without data: a generator makes inputs that the teacher finds convincing."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trine.distill.capture import Capture
from trine.distill.objectives.base import Batch, Terms, look

__all__ = ["DataFree"]


class DataFree:
    """A transform for `Distiller` that makes inputs of noise (DAFL, Chen et al. 2019,
    arXiv:1904.01186), and trains what makes them.

    The loader gives noise as "inputs" [B, ...]; the generator makes inputs of it. With z, f the
    teacher's logits and features of those, the generator takes one step on

        "one_hot"      the cross entropy of z with its own argmax: inputs are of a class
        "activation"   -mean |f|: they excite the teacher
        "balance"      sum of p log p, p the mean of softmax(z) over the batch: of all classes

    weighed 1, alpha and beta. The student then learns from inputs made by the generator as it was
    before that step. Several processes average the generator's gradients.

    Args:
        teacher: its parameters are not changed; gradients flow through it to its inputs.
        generator: noise [B, ...] to inputs.
        features: path of the module of f, as for `Capture`.
        alpha, beta: 0.1 and 5 in the paper.
        learning_rate: of Adam.

    `terms` holds the last step's three numbers. Checkpoints of the Distiller hold the generator.
    """

    def __init__(
        self,
        teacher: nn.Module,
        generator: nn.Module,
        features: str,
        *,
        alpha: float = 0.1,
        beta: float = 5.0,
        learning_rate: float = 1e-3,
    ) -> None:
        self.teacher = Capture(teacher.eval().requires_grad_(False), {"features": features})
        self.generator, self.alpha, self.beta = generator, alpha, beta
        self.optimizer = torch.optim.Adam(generator.parameters(), learning_rate)
        self.terms: dict[str, float] = {}

    def __call__(self, batch: Batch, student: nn.Module) -> Batch:
        self.teacher.model.eval()
        self.generator.train()
        inputs = self.generator(batch["inputs"])
        terms = generator_terms(self.teacher(inputs)[1])
        loss = terms["one_hot"] + self.alpha * terms["activation"] + self.beta * terms["balance"]
        self.optimizer.zero_grad()
        loss.backward()
        if dist.is_initialized():
            for parameter in self.generator.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        self.optimizer.step()
        self.terms = {name: float(value.detach()) for name, value in terms.items()}
        return {**batch, "inputs": inputs.detach()}

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])


def generator_terms(view: dict[str, Tensor]) -> Terms:
    """Of the teacher's view of made inputs: see `DataFree`."""
    logits = look(view, "logits", "teacher").float()
    mean = logits.softmax(-1).mean(0)
    return {
        "one_hot": nn.functional.cross_entropy(logits, logits.argmax(-1)),
        "activation": -look(view, "features", "teacher").float().abs().mean(),
        "balance": torch.xlogy(mean, mean).sum(),
    }
