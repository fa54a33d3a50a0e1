"""Activations with one scale for the whole tensor, in training: their range, and their grid."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from trine.quantize.followed import Followed
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


class InputRange(Followed):
    """Between which values a layer's inputs lie: a moving average over the updates of a training.

    Buffers: low and high float32 [1], the range in use. `seen` [2]: the largest of -x and of x.
    """

    NOTHING = -torch.inf

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__(torch.empty(2, device=device))
        for name in ("low", "high"):
            self.register_buffer(name, torch.empty(1, device=device))

    def begin(self, low: Tensor, high: Tensor) -> None:
        self.low.copy_(low.reshape(1))
        self.high.copy_(high.reshape(1))
        self.forget()

    @torch.no_grad()
    def watch(self, x: Tensor) -> None:
        if self.frozen or x.numel() == 0:
            return
        low, high = x.detach().float().aminmax()
        self.seen.copy_(torch.maximum(self.seen, torch.stack((-low, high))))

    def _reduction(self) -> distributed.ReduceOp:
        return distributed.ReduceOp.MAX

    def _move(self) -> None:
        self.low.lerp_(-self.seen[:1].to(self.low.dtype), 1 - MOMENTUM)
        self.high.lerp_(self.seen[1:].to(self.high.dtype), 1 - MOMENTUM)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale float32 [1] and zero point int32 [1]; the scale is NaN where no range is set."""
        scale, zero_point = grid(self.low, self.high)
        return torch.where(self.low.isnan(), torch.nan, scale), zero_point
