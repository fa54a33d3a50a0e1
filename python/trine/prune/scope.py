"""Among which groups the lowest are looked for, and how many are removed.

`keep(groups, now)` gets scores by key, infinite where a group has to stay, and a function from a
ratio that is aimed at to that of now; it returns which groups are kept.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from trine.prune.granularity import Granularity

__all__ = ["Global", "PerLayer", "Scope", "Threshold"]

Ratio = Callable[[float], float]


class Scope:
    def check(self, sizes: Mapping[str, int], granularity: Granularity) -> None:
        """Raises ValueError where so many groups by key can't be pruned as it wants."""

    def keep(self, groups: Mapping[str, Tensor], now: Ratio) -> dict[str, Tensor]:
        """Which groups are kept: bool, by key."""
        raise NotImplementedError


class PerLayer(Scope):
    """The lowest of each layer.

    Args:
        ratio: the share of its groups that is removed, in [0, 1); or one for each layer (each key),
            such as a budget gives.

    Raises ValueError for a ratio outside of [0, 1).
    """

    def __init__(self, ratio: float | Mapping[str, float]) -> None:
        self.ratio = dict(ratio) if isinstance(ratio, Mapping) else ratio
        for value in self.ratio.values() if isinstance(ratio, Mapping) else (ratio,):
            _check_ratio("PerLayer", value)

    def check(self, sizes: Mapping[str, int], granularity: Granularity) -> None:
        if isinstance(self.ratio, dict) and self.ratio.keys() != sizes.keys():
            raise ValueError(
                "PerLayer: needs a ratio for each of "
                f"{', '.join(sizes)}; it has those of {', '.join(self.ratio)}"
            )
        for key, size in sizes.items():
            if size == 1:
                raise ValueError(
                    f"PerLayer: '{key}' is a single group, there is nothing to choose from; use "
                    "Global, or leave it out"
                )
            _check_count(f"PerLayer: of '{key}'", self._of(key), size, granularity.most(size))

    def keep(self, groups: Mapping[str, Tensor], now: Ratio) -> dict[str, Tensor]:
        return {key: _all_but_lowest(scores, now(self._of(key))) for key, scores in groups.items()}

    def _of(self, key: str) -> float:
        return self.ratio[key] if isinstance(self.ratio, dict) else self.ratio


class Global(Scope):
    """The lowest of all layers together. Scores of groups that differ in size are sums: a large
    group has more of them.

    Args:
        ratio: the share of all groups that is removed, in [0, 1).

    Raises ValueError for a ratio outside of [0, 1).
    """

    def __init__(self, ratio: float) -> None:
        _check_ratio("Global", ratio)
        self.ratio = ratio

    def check(self, sizes: Mapping[str, int], granularity: Granularity) -> None:
        most = sum(granularity.most(size) for size in sizes.values())
        _check_count("Global:", self.ratio, sum(sizes.values()), most)

    def keep(self, groups: Mapping[str, Tensor], now: Ratio) -> dict[str, Tensor]:
        together = torch.cat([scores.flatten() for scores in groups.values()])
        kept = _all_but_lowest(together, now(self.ratio))
        parts = kept.split([scores.numel() for scores in groups.values()])
        return {
            key: part.reshape(scores.shape)
            for (key, scores), part in zip(groups.items(), parts, strict=True)
        }


class Threshold(Scope):
    """Whatever scores more than a value stays; how much that is, training decides."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def keep(self, groups: Mapping[str, Tensor], now: Ratio) -> dict[str, Tensor]:
        return {key: scores > self.value for key, scores in groups.items()}


def _all_but_lowest(scores: Tensor, ratio: float) -> Tensor:
    """Marks what is kept when that share is removed; among equals the first stay."""
    flat = scores.flatten()
    remove = round(ratio * len(flat))
    if remove == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    limit = _lowest(flat, remove)
    if limit == torch.inf:  # more than may be removed
        return scores == torch.inf
    kept = flat > limit
    spare = len(flat) - remove - int(kept.sum())  # how many of those at the limit stay
    if spare:
        kept[(flat == limit).nonzero()[:spare]] = True
    return kept.reshape(scores.shape)


def _lowest(flat: Tensor, rank: int) -> Tensor:
    """The value of that rank, the lowest being the first."""
    if flat.device.type == "cpu":
        return flat.new_tensor(_lowest_of(flat.detach().numpy(), rank))
    return flat.kthvalue(rank).values


def _lowest_of(values: np.ndarray, rank: int) -> float:
    """By NumPy's partition: 10 times as fast as torch's kthvalue, but not where many are equal, as
    those are that were pruned before. They are the lowest."""
    first = values.min()
    ties = np.count_nonzero(values == first)
    if rank <= ties:
        return first
    if ties > len(values) // 8:
        values, rank = values[values > first], rank - ties
    return np.partition(values, rank - 1)[rank - 1]


def _check_ratio(who: str, ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise ValueError(f"{who}: a ratio is the share removed, in [0, 1); it is {ratio}")


def _check_count(who: str, ratio: float, groups: int, most: int) -> None:
    most = min(most, groups - 1)
    if round(ratio * groups) > most:
        raise ValueError(
            f"{who} {round(ratio * groups)} of {groups} groups would be removed (ratio {ratio}); "
            f"at most {most} can be"
        )
