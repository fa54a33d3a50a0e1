"""Layers as products of smaller ones, and weights that several share: see README.md."""

from trine.factorize.clustering import cluster, decoded
from trine.factorize.embeddings import factorize_embedding
from trine.factorize.factorize import factorize
from trine.factorize.plan import Method, Plan
from trine.factorize.ranks import Energy, Parameters, Rank, Ranks, Speedup
from trine.factorize.report import FactorizationReport, LayerChange
from trine.factorize.residual import SvdWithSparse24
from trine.factorize.sharing import share_layers
from trine.factorize.svd import Svd
from trine.factorize.tensors import Cp, Tucker

__all__ = [
    "Cp",
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
    "SvdWithSparse24",
    "Tucker",
    "cluster",
    "decoded",
    "factorize",
    "factorize_embedding",
    "share_layers",
]
