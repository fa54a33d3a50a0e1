"""State that a training follows: watched in forward passes, moved once an update, then frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, distributed, nn


class Followed(nn.Module):
    """What `QatSchedule` moves and freezes.

    A forward pass in training notes what it sees in `seen` alone, in such a way that seeing each
    batch twice (activation checkpointing does that) counts no more than once. `update` puts
    together what all processes have seen, so that all of them move the state alike.

    `seen`, float32, is no buffer: DistributedDataParallel would overwrite it by that of the first
    process in every forward pass.
    """

    NOTHING: ClassVar[float]  # what `seen` is filled with at first

    def __init__(self, seen: Tensor) -> None:
        super().__init__()
        self.frozen = False
        self.seen = seen
        self.forget()

    def _reduction(self) -> distributed.ReduceOp:
        """How what two processes have seen becomes what both have."""
        raise NotImplementedError

    def _move(self) -> None:
        """Move the state towards what was seen."""
        raise NotImplementedError

    def forget(self) -> None:
        self.seen.fill_(self.NOTHING)

    @torch.no_grad()
    def update(self) -> None:
        """Move the state towards what was seen since the last call, in all processes together."""
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(self.seen, self._reduction())
        if not self.frozen and self.seen.isfinite().all():
            self._move()
        self.forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Followed:
        self.seen = fn(self.seen).float()
        return super()._apply(fn, recurse)
