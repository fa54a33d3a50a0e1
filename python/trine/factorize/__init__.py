"""Layers as products of smaller ones, and weights that several share: see README.md."""

from trine.factorize.factorize import factorize
from trine.factorize.plan import Method, Plan
from trine.factorize.ranks import Energy, Parameters, Rank, Ranks, Speedup
from trine.factorize.report import FactorizationReport, LayerChange
from trine.factorize.svd import Svd

__all__ = [
    "Energy",
    "FactorizationReport",
    "LayerChange",
    "Method",
    "Parameters",
    "Plan",
    "Rank",
    "Ranks",
    "Speedup",
    "Svd",
    "factorize",
]
