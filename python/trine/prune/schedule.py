"""When something is pruned, and how much of what is aimed at.

A schedule says for each number of updates so far what is to happen then, or None. Number 0 is
before the first update.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Cubic", "Event", "Iterative", "OneShot", "RigL", "Schedule"]


@dataclass(frozen=True)
class Event:
    """`ratio`: from the ratio that is aimed at to that of now. `regrow`: the share of what is kept
    that is given up for others. `rewind`: whether the weights go back to those of an earlier time.
    """

    ratio: Callable[[float], float] = lambda aim: aim
    regrow: float = 0.0
    rewind: bool = False


class Schedule:
    """`last`: the number of updates after which nothing changes any more. `rewind`: the number of
    updates whose weights are kept to go back to, or None. `regrows`: whether any event does."""

    last: int
    rewind: int | None = None
    regrows = False

    def at(self, step: int) -> Event | None:
        raise NotImplementedError


class OneShot(Schedule):
    """All at once after `at` updates; 0: before the training."""

    def __init__(self, at: int = 0) -> None:
        self.last = _whole("OneShot: at", at, least=0)

    def at(self, step: int) -> Event | None:
        return Event() if step == self.last else None


class Cubic(Schedule):
    """Gradually, fast at first: s_t = s_f + (s_i - s_f) * (1 - (t - t_0) / (t_n - t_0))^3 (Zhu &
    Gupta 2017, arXiv:1710.01878).

    Args:
        begin, end: t_0 and t_n, in updates.
        every: updates from one pruning to the next.
        initial: s_i, the ratio at t_0.

    Raises ValueError unless 0 <= begin < end, every >= 1 and 0 <= initial < 1.
    """

    def __init__(self, begin: int, end: int, every: int = 1, initial: float = 0.0) -> None:
        self.begin = _whole("Cubic: begin", begin, least=0)
        self.last = _whole("Cubic: end", end, least=begin + 1)
        self.every = _whole("Cubic: every", every, least=1)
        if not 0 <= initial < 1:
            raise ValueError(f"Cubic: initial is a ratio in [0, 1); it is {initial}")
        self.initial = initial

    def at(self, step: int) -> Event | None:
        if not self.begin <= step <= self.last:
            return None
        if (step - self.begin) % self.every and step != self.last:
            return None
        if step == self.begin and not self.initial:
            return None  # nothing yet, of which no score need be known
        left = (1 - (step - self.begin) / (self.last - self.begin)) ** 3
        return Event(lambda aim: aim + (min(self.initial, aim) - aim) * left)


class Iterative(Schedule):
    """In rounds, each of which removes the same share of what is left; with `rewind` the kept
    weights then go back to what they were: a lottery ticket (Frankle & Carbin 2019,
    arXiv:1803.03635; to an early update: Frankle et al. 2020, arXiv:1903.01611).

    After round i of n the ratio is 1 - (1 - s)^(i/n). The optimiser's state goes back, too; its
    learning rate is the loop's affair.

    Args:
        rounds: n.
        every: updates of a round.
        rewind: the number of updates whose weights are gone back to (0: the initial ones); None:
            training goes on with the weights as they are.

    Raises ValueError unless rounds and every are at least 1 and 0 <= rewind < every.
    """

    def __init__(self, rounds: int, every: int, rewind: int | None = None) -> None:
        self.rounds = _whole("Iterative: rounds", rounds, least=1)
        self.every = _whole("Iterative: every", every, least=1)
        if rewind is not None and not 0 <= rewind < every:
            raise ValueError(f"Iterative: rewind must be in [0, every = {every}), it is {rewind}")
        self.rewind, self.last = rewind, rounds * every

    def at(self, step: int) -> Event | None:
        if step == 0 or step % self.every or step > self.last:
            return None
        done = step // self.every / self.rounds
        return Event(lambda aim: 1 - (1 - aim) ** done, rewind=self.rewind is not None)


class RigL(Schedule):
    """All at the beginning, and from then on the lowest of what is kept is exchanged for what
    has the largest gradients (Evci et al. 2020, arXiv:1911.11134).

    The share exchanged is share / 2 * (1 + cos(pi * t / end)); what comes back starts at 0.

    Args:
        end: the number of updates after which nothing is exchanged any more.
        every: updates from one exchange to the next.
        share: exchanged at first (alpha), in (0, 1).
        begin: the number of updates before all is pruned.

    Raises ValueError for other values.
    """

    regrows = True

    def __init__(self, end: int, every: int, share: float = 0.3, begin: int = 0) -> None:
        self.begin = _whole("RigL: begin", begin, least=0)
        self.last = _whole("RigL: end", end, least=begin + 1)
        self.every = _whole("RigL: every", every, least=1)
        if not 0 < share < 1:
            raise ValueError(f"RigL: share must lie in (0, 1), it is {share}")
        self.share = share

    def at(self, step: int) -> Event | None:
        if step == self.begin:
            return Event()
        if (step - self.begin) % self.every or not self.begin < step < self.last:
            return None
        return Event(regrow=self.share / 2 * (1 + math.cos(math.pi * step / self.last)))


def _whole(what: str, value: int, least: int) -> int:
    if value != int(value) or value < least:
        raise ValueError(f"{what} must be a whole number of at least {least}, it is {value}")
    return int(value)
