"""Smaller, faster PyTorch models: ternary, INT8 and 2:4-sparse layers on hand-written kernels."""

from trine import backends, calibration, distill, nn, ops, prune, quantize
from trine._C import version as __version__
from trine.calibration import calibrate
from trine.compress import Recipe, compress, load, save
from trine.compress.convert import convert

__all__ = [
    "Recipe",
    "__version__",
    "backends",
    "calibrate",
    "calibration",
    "compress",
    "convert",
    "distill",
    "load",
    "nn",
    "ops",
    "prune",
    "quantize",
    "save",
]
