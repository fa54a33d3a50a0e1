"""What range of values an activation takes, watched over data, and the int8 grid that fits it.

An observer is a statistic of `trine.calibrate`: `update(rows)` takes rows as they come, `range()`
says between which values the grid should lie. All but `MinMax` leave outliers out, each by its own
measure; a value outside of the range is clamped.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from trine.ops.quantize_rows.reference import SMALLEST_ABSMAX

__all__ = [
    "Entropy",
    "Histogram",
    "MeanMagnitude",
    "MeanSquaredError",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
    "grid",
]

# Of the histograms. 2048 bins are eight to a level of the grid; a range that grows doubles them in
# width, so that never fewer than 1024 are in use.
BINS = 2048
LEVELS = 256  # of int8


def grid(low: Tensor, high: Tensor, *, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """The scale and zero point with which int8 covers [low, high], and 0 exactly.

    asymmetric: S = (high - low) / 255, Z = round(-low / S) - 128, q = round(r / S) + Z.
    symmetric: S = max(|low|, |high|) / 127, Z = 0.
    (low and high are moved to 0 where they lie on one side of it; a range that is narrower than
    2^-120, where `quantize_rows` sees nothing but 0, too, gets scale 1.)

    Args:
        low, high: one value each.

    Returns:
        scale float32 [1] and zero point int32 [1] in [-128, 127], as `int8_linear` takes them.
    """
    low = low.detach().float().reshape(1).clamp(max=0)
    high = high.detach().float().reshape(1).clamp(min=0)
    width = 2 * torch.maximum(-low, high) if symmetric else high - low
    steps = LEVELS - 2 if symmetric else LEVELS - 1
    scale = torch.where(width >= SMALLEST_ABSMAX, width / steps, 1.0)
    if symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    zero_point = (-low / scale).round() - LEVELS // 2
    return scale, zero_point.clamp(-128, 127).to(torch.int32)


class Observer(Protocol):
    """A statistic that ends in a range."""

    def update(self, rows: Tensor) -> None: ...

    def range(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest value to be told apart, float32 []."""


class MinMax:
    """From the least to the greatest value seen."""

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        low, high = (end.float() for end in rows.aminmax())
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def range(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high


class MovingAverage:
    """The averages of each update's least and greatest value, the latest weighted most.

    end <- momentum * end + (1 - momentum) * its value in this update; the first one starts it.

    Args:
        momentum: in [0, 1).
    """

    def __init__(self, momentum: float = 0.9) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"MovingAverage: momentum is {momentum}; it must lie in [0, 1)")
        self.momentum = momentum
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        low, high = (end.float() for end in rows.aminmax())
        if self.low is None:
            self.low, self.high = low, high
        self.low = torch.lerp(low, self.low, self.momentum)
        self.high = torch.lerp(high, self.high, self.momentum)

    def range(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high


class MeanMagnitude:
    """E|x| of all values: `mean` float32 [], which learned steps begin at."""

    def __init__(self) -> None:
        self.values = 0
        self.sum: Tensor | float = 0.0

    def update(self, rows: Tensor) -> None:
        self.values += rows.numel()
        self.sum = self.sum + rows.abs().sum(dtype=torch.float64)

    @property
    def mean(self) -> Tensor:
        return (self.sum / self.values).float()


class Histogram:
    """How often values fell in each of `BINS` bins around 0, whose width doubles as it must.

    Bin i holds values in [(i - BINS / 2) * width, (i + 1 - BINS / 2) * width). Doubling the width
    adds bins up in pairs, so that no value is asked for twice.
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None
        self.width = 0.0
        self.ends = MinMax()

    def update(self, rows: Tensor) -> None:
        values = rows.detach().float()
        self.ends.update(values)
        absmax = values.abs().max().item()
        if self.counts is None:
            self.counts = torch.zeros(BINS, dtype=torch.float64, device=values.device)
        if absmax > 0 and self.width == 0:
            # Values seen before were all 0, which lie in the same bin at any width.
            self.width = 1.01 * absmax / (BINS // 2)  # the greatest lies inside, not on, the end
        while absmax >= self.width * (BINS // 2) and absmax > 0:
            self._double()
        width = self.width or 1.0
        bins = (values / width).floor().long() + BINS // 2
        self.counts += torch.bincount(bins.flatten(), minlength=BINS).double()

    def _double(self) -> None:
        quarter = torch.zeros(BINS // 4, dtype=torch.float64, device=self.counts.device)
        self.counts = torch.cat((quarter, self.counts.reshape(-1, 2).sum(1), quarter))
        self.width *= 2

    @property
    def edges(self) -> Tensor:
        """The BINS + 1 places where bins begin and end, float64."""
        steps = torch.arange(BINS + 1, dtype=torch.float64, device=self.counts.device)
        return (steps - BINS // 2) * self.width

    @property
    def centres(self) -> Tensor:
        return self.edges[:-1] + self.width / 2


class Percentile(Histogram):
    """The range that leaves out the same share of values at either end.

    Args:
        share: of all values that lie inside, in (0, 1]; 0.9999 leaves out one of 20,000 at the top.
    """

    def __init__(self, share: float = 0.9999) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise ValueError(f"Percentile: share is {share}; it must lie in (0, 1]")
        self.share = share

    def range(self) -> tuple[Tensor, Tensor]:
        low, high = self.ends.range()
        outside = (1 - self.share) / 2 * self.counts.sum()
        from_below = self.counts.cumsum(0)
        from_above = self.counts.flip(0).cumsum(0).flip(0)
        # The first and the last bin that hold what may not be left out.
        first = (from_below > outside).nonzero()[0, 0]
        last = (from_above > outside).nonzero()[-1, 0]
        low = torch.maximum(self.edges[first].float(), low)
        return low, torch.minimum(self.edges[last + 1].float(), high)


class _Searched(Histogram):
    """The range [-t, t], as far as values lie in it, of the t whose `cost` is least.

    t goes down from the largest magnitude to a fiftieth of it, each step by two percent of it.
    """

    def __init__(self, symmetric: bool = False) -> None:
        super().__init__()
        self.symmetric = symmetric

    def range(self) -> tuple[Tensor, Tensor]:
        low, high = self.ends.range()
        if not self.width:
            return low, high
        absmax = torch.maximum(-low, high)
        limits = [(1 - 0.02 * step) * absmax for step in range(50)]
        ranges = [(torch.maximum(low, -t), torch.minimum(high, t)) for t in limits]
        return min(ranges, key=lambda ends: self.cost(*ends))

    def cost(self, low: Tensor, high: Tensor) -> float:
        raise NotImplementedError


class MeanSquaredError(_Searched):
    """The range with which rounding and clamping change the values least: min sum (x - x_q)^2.

    Args:
        symmetric: of the grid that will be laid over the range (see `grid`).
    """

    def cost(self, low: Tensor, high: Tensor) -> float:
        scale, zero_point = (part.double() for part in grid(low, high, symmetric=self.symmetric))
        codes = ((self.centres / scale).round() + zero_point).clamp(-128, 127)
        errors = (codes - zero_point) * scale - self.centres
        return (self.counts * errors.square()).sum().item()


class Entropy(_Searched):
    """The range whose 256 levels keep most of the distribution: min KL(values || levels).

    As TensorRT calibrates (Migacz 2017): P is the histogram with what lies outside added to its
    outermost bins inside; Q spreads the sum of P (without what was added) over each level evenly
    over the bins of that level that P holds something in.

    Args:
        symmetric: of the grid that will be laid over the range (see `grid`).
    """

    def cost(self, low: Tensor, high: Tensor) -> float:
        scale, zero_point = (part.double() for part in grid(low, high, symmetric=self.symmetric))
        codes = (self.centres / scale).round() + zero_point
        inside = (codes >= -128) & (codes <= 127)
        if not inside.any():
            return float("inf")
        level = (codes.clamp(-128, 127) + 128).long()
        held = torch.where(inside, self.counts, 0.0)
        p = held.clone()
        places = inside.nonzero()[:, 0]
        p[places[0]] += self.counts[: places[0]].sum()
        p[places[-1]] += self.counts[places[-1] + 1 :].sum()
        occupied = (p > 0) & inside
        sums = held.new_zeros(LEVELS).index_add_(0, level, held)
        bins = held.new_zeros(LEVELS).index_add_(0, level, occupied.double())
        q = torch.where(occupied, (sums / bins.clamp(min=1))[level], 0.0)
        p, q = p[occupied] / p.sum(), q[occupied] / q.sum().clamp(min=1e-300)
        # A bin that only the outside put something in has Q = 0: counted as one value of it.
        return (p * (p / q.clamp(min=1 / self.counts.sum().item())).log()).sum().item()
