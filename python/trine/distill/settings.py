"""How a student is trained: the usual habits, as numbers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["Training"]


@dataclass(frozen=True)
class Training:
    """Settings of `Distiller`. Steps are updates of the weights, epochs passes over the loader.

    Args:
        epochs: passes over the training data.
        steps: updates at most; None: as many as the epochs have.
        learning_rate: at its peak.
        adapter_rate: that of an objective's or balance's own parameters, as a multiple of it.
        optimizer: "adamw" or "sgd" (with Nesterov's momentum).
        momentum: of "sgd".
        weight_decay: of matrices; vectors (biases, norms) have none.
        warmup: the share of all steps in which the rate rises from 0.
        decay: what it does afterwards: "cosine" or "linear" to 0, "constant", or "restarts", half a
            cosine to 0 `restarts` times.
        restarts: see decay.
        clip: largest L2 norm of the gradient; None: any.
        accumulate: batches to an update.
        precision: "fp32", or "bf16" or "fp16" for automatic mixed precision (fp16 needs a GPU).
        ema: decay of an exponential moving average of the student, which is then what is evaluated
            and returned; None: no average.
        patience: evaluations without a better score after which training ends; None: never early.
        evaluate_every, save_every: steps; None: once an epoch.
        parallel: "none" one process, "ddp" a copy of the model in each, "fsdp" shards of it
            (torch's fully_shard), "auto" "ddp" where there are several processes and else "none".
        processes: how many there must be; None: as many as there are.
        seed: of the order of examples, dropout, augmentation and new layers.

    Raises ValueError for values that make no sense.
    """

    epochs: int = 3
    steps: int | None = None
    learning_rate: float = 5e-4
    adapter_rate: float = 1.0
    optimizer: str = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.01
    warmup: float = 0.1
    decay: str = "cosine"
    restarts: int = 1
    clip: float | None = 1.0
    accumulate: int = 1
    precision: str = "fp32"
    ema: float | None = None
    patience: int | None = None
    evaluate_every: int | None = None
    save_every: int | None = None
    parallel: str = "auto"
    processes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "optimizer": ("adamw", "sgd"),
            "decay": ("cosine", "linear", "constant", "restarts"),
            "precision": ("fp32", "bf16", "fp16"),
            "parallel": ("auto", "none", "ddp", "fsdp"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"Training: {name} must be one of {', '.join(map(repr, allowed))}; it is "
                    f"{getattr(self, name)!r}"
                )
        for name in ("epochs", "accumulate", "restarts", "steps", "evaluate_every", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Training: {name} must be at least 1, it is {value}")
        for name in ("warmup", "ema"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"Training: {name} must lie in [0, 1), it is {value}")

    def make_optimizer(
        self, student: Iterable[nn.Parameter], adapters: Iterable[nn.Parameter]
    ) -> torch.optim.Optimizer:
        groups = []
        for parameters, rate in ((student, 1.0), (adapters, self.adapter_rate)):
            trained = [p for p in parameters if p.requires_grad]
            for is_matrix, decay in ((True, self.weight_decay), (False, 0.0)):
                of_group = [p for p in trained if (p.dim() > 1) == is_matrix]
                if of_group:
                    rates = {"lr": self.learning_rate * rate, "weight_decay": decay}
                    groups.append({"params": of_group, **rates})
        if not groups:
            raise ValueError("the student has no parameters that require a gradient")
        if self.optimizer == "adamw":
            # One pass over the weights for a dozen: a quarter of the time on a CPU. A scaler leaves
            # it to such an optimiser to unscale gradients, which a pruner has to see before.
            return torch.optim.AdamW(groups, fused=self.precision != "fp16")
        return torch.optim.SGD(groups, momentum=self.momentum, nesterov=self.momentum > 0)

    def updates(self, batches: int) -> int:
        """How many there are in all, with so many batches in an epoch."""
        in_epoch = -(-batches // self.accumulate)
        return min(in_epoch * self.epochs, self.steps or 2**62)

    def rate_at(self, step: int, steps: int) -> float:
        """The share of the peak learning rate at an update, of `steps` in all."""
        rise = round(self.warmup * steps)
        if step < rise:
            return (step + 1) / rise
        if self.decay == "constant":
            return 1.0
        share = (step - rise) / max(1, steps - rise)
        if self.decay == "linear":
            return 1 - share
        periods = self.restarts if self.decay == "restarts" else 1
        return 0.5 * (1 + math.cos(math.pi * (share * periods % 1 if share < 1 else 1)))
