"""Which rank each layer gets: the same, by energy, by a budget of parameters, by measured speed."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from trine.factorize.plan import AnyRank, Plan

# How many times as fast a layer is with that rank: by the name of the layer.
Clock = Callable[[str, AnyRank], float]


class Ranks(Protocol):
    """Chooses a rank for each layer, or None where it is to stay as it is."""

    def choose(
        self, plans: Mapping[str, Plan], clock: Clock | None
    ) -> dict[str, AnyRank | None]: ...


@dataclass(frozen=True)
class Rank:
    """The same rank for every layer; a pair (inputs, outputs) for `Tucker`."""

    rank: AnyRank

    def choose(
        self, plans: Mapping[str, Plan], clock: Clock | None = None
    ) -> dict[str, AnyRank | None]:
        for name, plan in plans.items():
            try:
                plan.size(self.rank)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}; or leave it out with skip") from None
        return dict.fromkeys(plans, self.rank)


@dataclass(frozen=True)
class Energy:
    """The least rank that keeps at least this share of the squared norm, for each layer.

    ||W'||_F^2 / ||W||_F^2, or of the outputs ||X W'^T||_F^2 / ||X W^T||_F^2 where the method is
    calibrated: sum of the kept s_i^2 over that of all.

    Raises ValueError for a share that is not above 0 and at most 1.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"Energy: the share is {self.share}; it must be above 0, at most 1")

    def choose(
        self, plans: Mapping[str, Plan], clock: Clock | None = None
    ) -> dict[str, AnyRank | None]:
        _require_losses(plans, "Energy")
        return {
            name: next(
                rank
                for rank, loss in zip(plan.ranks, plan.losses, strict=True)
                if loss <= 1 - self.share
            )
            for name, plan in plans.items()
        }


@dataclass(frozen=True)
class Parameters:
    """At most this share of the layers' parameters, spread so that little is lost in total.

    Minimises the lost share of squared norm, averaged over the layers, each counted by its number
    of parameters: every layer starts with its least rank, and the step that saves most per
    parameter comes next, until the next does not fit. A layer may come out dense. Steps are those
    of the lower convex hull of (parameters, loss) of each layer, which makes the result the best
    one of its size.

    Raises ValueError for a share that is not between 0 and 1, or too small for rank 1 everywhere.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"Parameters: the share is {self.share}; it must be between 0 and 1")

    def choose(
        self, plans: Mapping[str, Plan], clock: Clock | None = None
    ) -> dict[str, AnyRank | None]:
        _require_losses(plans, "Parameters")
        hulls = {name: _hull(_points(plan)) for name, plan in plans.items()}
        dense = sum(plan.dense for plan in plans.values())
        left = int(self.share * dense) - sum(hull[0][0] for hull in hulls.values())
        if left < 0:
            least = (int(self.share * dense) - left) / dense
            raise ValueError(
                f"Parameters: {self.share:.3g} of the layers' {dense} parameters are fewer than "
                f"the least ranks take; give at least {least:.3g}"
            )
        place = dict.fromkeys(hulls, 0)
        steps = [(_slope(hull, 0), name) for name, hull in hulls.items() if len(hull) > 1]
        heapq.heapify(steps)
        while steps:
            _, name = heapq.heappop(steps)
            hull, at = hulls[name], place[name]
            cost = hull[at + 1][0] - hull[at][0]
            if cost > left:
                break
            left -= cost
            place[name] = at + 1
            if at + 2 < len(hull):
                heapq.heappush(steps, (_slope(hull, at + 1), name))
        return {name: hulls[name][at][2] for name, at in place.items()}


@dataclass(frozen=True)
class Speedup:
    """The largest rank with which the layer is measured at least `ratio` times as fast as it was.

    Ranks are tried in steps of `multiple` (vector units like those), by bisection: a smaller rank
    is taken to be no slower. A layer that no rank makes that fast stays as it is.

    Raises ValueError for a ratio of 1 or less or a multiple below 1.
    """

    ratio: float
    multiple: int = 8

    def __post_init__(self) -> None:
        if not self.ratio > 1 or self.multiple < 1:
            raise ValueError(
                f"Speedup: ratio is {self.ratio}, multiple is {self.multiple}; the ratio must be "
                "above 1, the multiple at least 1"
            )

    def choose(
        self, plans: Mapping[str, Plan], clock: Clock | None = None
    ) -> dict[str, AnyRank | None]:
        if clock is None:
            raise ValueError("Speedup measures; give factorize sample_inputs")
        return {name: self._largest(name, plan, clock) for name, plan in plans.items()}

    def _largest(self, name: str, plan: Plan, clock: Clock) -> AnyRank | None:
        smaller = sum(size < plan.dense for size in plan.parameters)
        ranks = plan.ranks[self.multiple - 1 : smaller : self.multiple]
        # ranks[:fast] are fast enough, ranks[slow:] are not.
        fast, slow = 0, len(ranks)
        while fast < slow:
            middle = (fast + slow) // 2
            if clock(name, ranks[middle]) >= self.ratio:
                fast = middle + 1
            else:
                slow = middle
        return ranks[fast - 1] if fast else None


Point = tuple[int, float, AnyRank | None]  # parameters, loss times those of the layer, rank


def _points(plan: Plan) -> list[Point]:
    points = [
        (size, loss * plan.dense, rank)
        for size, loss, rank in zip(plan.parameters, plan.losses, plan.ranks, strict=True)
        if size < plan.dense
    ]
    return [*points, (plan.dense, 0.0, None)]


def _hull(points: list[Point]) -> list[Point]:
    """The corners of the lower convex hull of points in ascending order of parameters."""
    hull: list[Point] = []
    for point in points:
        if hull and point[1] >= hull[-1][1]:
            continue  # more parameters for nothing
        while len(hull) > 1 and _slope([hull[-2], point], 0) <= _slope(hull[-2:], 0):
            hull.pop()
        hull.append(point)
    return hull


def _slope(hull: list[Point], at: int) -> float:
    (size, loss, _), (larger, less, _) = hull[at], hull[at + 1]
    return (less - loss) / (larger - size)


def _require_losses(plans: Mapping[str, Plan], who: str) -> None:
    for name, plan in plans.items():
        if not plan.losses:
            raise ValueError(
                f"{who} needs to know what each rank loses, which it cannot for layer {name!r}; "
                "give a Rank"
            )
