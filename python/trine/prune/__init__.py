"""Removing what a model needs least: see README.md in this folder."""

from trine.prune.criteria import Change, Criterion, Magnitude, Random, SparseGPT, Wanda
from trine.prune.layers import prunable_layers
from trine.prune.one_shot import sparsegpt, wanda
from trine.prune.sparse24 import as_sparse24, sr_ste

__all__ = [
    "Change",
    "Criterion",
    "Magnitude",
    "Random",
    "SparseGPT",
    "Wanda",
    "as_sparse24",
    "prunable_layers",
    "sparsegpt",
    "sr_ste",
    "wanda",
]
