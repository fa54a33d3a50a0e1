"""Removing what a model needs least: see README.md in this folder."""

from trine.prune.criteria import Change, Criterion, Magnitude, Random
from trine.prune.layers import prunable_layers

__all__ = ["Change", "Criterion", "Magnitude", "Random", "prunable_layers"]
