"""Channels in another order, so that 2:4 keeps more of the weights."""

from trine.prune.permute.apply import (
    KeptMagnitude,
    attention_values,
    linked_channels,
    permute_for_24,
)
from trine.prune.permute.search import kept_magnitude, search_permutation

__all__ = [
    "KeptMagnitude",
    "attention_values",
    "kept_magnitude",
    "linked_channels",
    "permute_for_24",
    "search_permutation",
]
