"""Activations with one scale for the whole tensor, in training: their range, and their grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trine.quantize.observers import grid

# Of the moving average: about the last hundred updates count, as in torch.ao's default observer.
MOMENTUM = 0.99


def static_rows(rows: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows as `int8_linear` quantises them with one scale, the zero point taken off.

    Returns float32 [M, K] of integers, and the scale of each row [M]: NaN for a row that holds NaN
    or infinity.
    """
    wide, shift = rows.float(), 0 if zero_point is None else zero_point
    finite = wide.isfinite().all(1)
    steps = ((wide / scale).round() + shift).clamp(-128, 127) - shift
    return torch.where(finite[:, None], steps, 0.0), torch.where(finite, scale, torch.nan)


class InputRange(nn.Module):
    """Between which values a layer's inputs lie: a moving average over the updates of a training.

    `watch` only widens what has been seen since the last `update`, and so may see a batch twice
    (activation checkpointing does that): the grid stays as it is until `update`.

    Buffers: low and high float32 [1], the range in use; seen_low and seen_high, since `update`.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__()
        for name in ("low", "high", "seen_low", "seen_high"):
            self.register_buffer(name, torch.empty(1, device=device))
        self.frozen = False

    def begin(self, low: Tensor, high: Tensor) -> None:
        self.low.copy_(low.reshape(1))
        self.high.copy_(high.reshape(1))
        self._forget_seen()

    def _forget_seen(self) -> None:
        self.seen_low.fill_(torch.inf)
        self.seen_high.fill_(-torch.inf)

    @torch.no_grad()
    def watch(self, x: Tensor) -> None:
        if self.frozen or x.numel() == 0:
            return
        low, high = x.detach().float().aminmax()
        self.seen_low.copy_(torch.minimum(self.seen_low, low))
        self.seen_high.copy_(torch.maximum(self.seen_high, high))

    @torch.no_grad()
    def update(self) -> None:
        """Move the range towards what was seen, in all processes together."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.seen_low, torch.distributed.ReduceOp.MIN)
            torch.distributed.all_reduce(self.seen_high, torch.distributed.ReduceOp.MAX)
        if not self.frozen and self.seen_low.isfinite().all() and self.seen_high.isfinite().all():
            self.low.lerp_(self.seen_low, 1 - MOMENTUM)
            self.high.lerp_(self.seen_high, 1 - MOMENTUM)
        self._forget_seen()

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale float32 [1] and zero point int32 [1]; the scale is NaN where no range is set."""
        scale, zero_point = grid(self.low, self.high)
        return torch.where(self.low.isnan(), torch.nan, scale), zero_point
