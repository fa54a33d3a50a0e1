"""Numbers that change with the step: weights of terms, temperatures."""

import bisect
import math
from collections.abc import Callable, Sequence

__all__ = [
    "Schedule",
    "Scheduled",
    "constant",
    "cosine",
    "linear",
    "piecewise",
    "temperature_for_batch",
]

Schedule = Callable[[int], float]  # of the number of updates so far
Scheduled = float | Schedule


def at_step(value: Scheduled, step: int) -> float:
    return value(step) if callable(value) else value


def constant(value: float) -> Schedule:
    return lambda step: value


def linear(start: float, end: float, steps: int, *, after: int = 0) -> Schedule:
    """`start` for `after` steps, then straight to `end` in `steps` more, and `end` from there on.

    linear(0, 0.7, 1000, after=500) warms soft targets up behind hard labels.
    """
    return lambda step: start + (end - start) * _share(step, steps, after)


def cosine(start: float, end: float, steps: int, *, after: int = 0) -> Schedule:
    """As `linear`, along half a cosine."""
    return lambda step: (
        end + (start - end) * 0.5 * (1 + math.cos(math.pi * _share(step, steps, after)))
    )


def piecewise(values: Sequence[float], boundaries: Sequence[int]) -> Schedule:
    """values[i] from step boundaries[i - 1] up to boundaries[i] - 1.

    Raises ValueError unless there is one value more than boundaries, and those ascend.
    """
    if len(values) != len(boundaries) + 1 or sorted(boundaries) != list(boundaries):
        raise ValueError(
            "piecewise: needs ascending boundaries and one value more than those; it has "
            f"{len(values)} values and the boundaries {list(boundaries)}"
        )
    return lambda step: values[bisect.bisect_right(boundaries, step)]


def _share(step: int, steps: int, after: int) -> float:
    return min(1.0, max(0.0, (step - after) / max(1, steps)))


def temperature_for_batch(temperature: float, batch: int, new_batch: int) -> float:
    """T for another batch size B that keeps the noise of the gradient: T proportional to B^(-1/4).

    Where T is large and the loss is not multiplied by T^2, a row's gradient is proportional to
    1 / T^2: one factor from logits / T, one from p - q. The standard deviation of a batch's mean is
    then proportional to 1 / (T^2 * sqrt(B)). With the factor T^2 it does not depend on T, and there
    is nothing to adapt: use it with `SoftTargets(..., scale_by_t_squared=False)`.
    """
    return temperature * (batch / new_batch) ** 0.25
