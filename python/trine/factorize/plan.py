"""What can be done with one layer: which ranks there are, what each costs and what each loses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

# One number, or one for each mode that is cut: (inputs, outputs) of a convolution.
AnyRank = int | tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """The ways to factorise one layer.

    dense: parameters of its weight.
    ranks, parameters, losses: in ascending order of parameters; a loss is the share of the squared
        norm that is lost (exactly, or at the most), so it descends. Empty losses: not known before
        it is built.
    build: the factorised layer of any rank, also of one that is not in `ranks`; ValueError for one
        that cannot be.
    size: the parameters of any rank.
    error: the relative error of a factorised layer, in the norm that the method minimises.
    """

    dense: int
    ranks: Sequence[AnyRank]
    parameters: Sequence[int]
    losses: Sequence[float]
    build: Callable[[AnyRank], nn.Module]
    size: Callable[[AnyRank], int]
    error: Callable[[nn.Module], float]


class Method(Protocol):
    """How a layer is factorised."""

    kinds: tuple[type[nn.Module], ...]  # of layers that it can take
    name: str

    def plan(self, name: str, layer: nn.Module) -> Plan:
        """The ways for the layer of that name. Raises ValueError where it cannot be done."""
