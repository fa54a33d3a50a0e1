"""One small training loop in plain PyTorch: AdamW, warm-up then cosine decay, everything seeded."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# loss(logits, inputs, labels) -> a scalar. The inputs are passed for a teacher to look at.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    epochs: int
    learning_rate: float = 1e-3
    batch: int = 64
    weight_decay: float = 1e-4
    warmup: float = 0.1  # share of all steps in which the learning rate rises from 0
    seed: int = 0


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    loss: Loss,
    schedule: Schedule,
    *,
    augment: Augment | None = None,
    on_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Train `model` in place and leave it in eval mode.

    The seed decides the order of the rows, the augmentation and the dropout; the caller's random
    state is left as it was. Every epoch sees each row once. One thread does the work, so that the
    weights do not depend on the number of cores.

    Args:
        images: [rows, ...], the inputs.
        labels: int64 [rows].
        augment: called with each batch and a seeded generator; returns the batch to train on.
        on_epoch: called after each epoch (a progress bar's tick).
    """
    draws = torch.Generator().manual_seed(schedule.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=schedule.learning_rate,
        weight_decay=schedule.weight_decay,
        fused=True,
    )
    steps = schedule.epochs * math.ceil(len(images) / schedule.batch)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_then_cosine(step, steps, schedule.warmup)
    )
    model.train()
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(schedule.seed)
        for _ in range(schedule.epochs):
            for rows in torch.randperm(len(images), generator=draws).split(schedule.batch):
                inputs = images[rows]
                if augment is not None:
                    inputs = augment(inputs, draws)
                optimizer.zero_grad()
                loss(model(inputs), inputs, labels[rows]).backward()
                optimizer.step()
                rate.step()
            on_epoch()
    model.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    """A batch of 64 digits is too little work to share: a second thread saves a tenth of the time
    on an idle machine and multiplies it on a busy one, where each product waits for both."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def warmup_then_cosine(step: int, steps: int, warmup: float) -> float:
    """The share of the peak learning rate at `step`: a straight rise, then half a cosine to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
