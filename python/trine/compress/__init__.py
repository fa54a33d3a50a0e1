"""Compress a model: recipe, measurement layer by layer, conversion, checkpoints."""

from trine.compress.recipe import Recipe

__all__ = ["Recipe"]
