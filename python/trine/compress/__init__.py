"""Compress a model: recipe, measurement layer by layer, conversion, checkpoints."""

from trine.compress.checkpoint import load, save
from trine.compress.compress import compress
from trine.compress.recipe import Recipe
from trine.compress.report import CompressionReport, LayerReport, ShapeTiming

__all__ = [
    "CompressionReport",
    "LayerReport",
    "Recipe",
    "ShapeTiming",
    "compress",
    "load",
    "save",
]
