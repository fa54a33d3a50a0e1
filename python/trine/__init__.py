"""Smaller, faster PyTorch models: ternary, INT8 and 2:4-sparse layers on hand-written kernels."""

from trine import backends, calibration, distill, export, factorize, nn, ops, prune, quantize
from trine._C import version as __version__
from trine.calibration import calibrate
from trine.compress import Recipe, compress, fuse_activations, fuse_norms, load, save
from trine.compress.convert import convert

__all__ = [
    "Recipe",
    "TrineConfig",
    "__version__",
    "backends",
    "calibrate",
    "calibration",
    "compress",
    "convert",
    "distill",
    "export",
    "factorize",
    "from_bitnet",
    "fuse_activations",
    "fuse_norms",
    "load",
    "nn",
    "ops",
    "prune",
    "quantize",
    "save",
]

# Asked for by name, because importing transformers takes long.
_OF_HUGGING_FACE = ("TrineConfig", "from_bitnet")


def __getattr__(name: str) -> object:
    if name in _OF_HUGGING_FACE:
        from trine import hugging_face

        return getattr(hugging_face, name)
    raise AttributeError(f"module 'trine' has no attribute {name!r}")
