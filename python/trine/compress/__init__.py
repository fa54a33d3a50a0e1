"""Compress a model: recipe, measurement layer by layer, conversion, checkpoints."""

from trine.compress.checkpoint import load, save
from trine.compress.compress import compress
from trine.compress.fuse_activations import fuse_activations
from trine.compress.fuse_norms import fuse_norms
from trine.compress.fusion_report import FusionReport, ModuleFusion
from trine.compress.recipe import Recipe
from trine.compress.report import CompressionReport, LayerReport, ShapeTiming

__all__ = [
    "CompressionReport",
    "FusionReport",
    "LayerReport",
    "ModuleFusion",
    "Recipe",
    "ShapeTiming",
    "compress",
    "fuse_activations",
    "fuse_norms",
    "load",
    "save",
]
