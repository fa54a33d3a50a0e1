"""Puts the Triton kernels behind the operators: compiled CUDA where it is loaded, else Triton."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

import torch

from trine import _library

# Operators and the folders of their kernels.
OPS = {
    "quantize_rows": "quantize_rows",
    "rms_norm_quantize_rows": "norm_quantize_rows",
    "layer_norm_quantize_rows": "norm_quantize_rows",
    "int8_embedding": "int8_embedding",
    "int8_linear": "int8_linear",
    "int8_linear_rows": "int8_linear",
    "int8_weight_linear": "int8_weight_linear",
    "int8_conv2d": "int8_conv2d",
    "ternary_linear": "ternary_linear",
    "ternary_linear_rows": "ternary_linear",
    "sparse24_linear": "sparse24_linear",
    "ternary24_linear": "ternary24_linear",
    "softmax_kl": "softmax_kl",
    "softmax_kl_backward": "softmax_kl",
}


def _kernel(op: str) -> Callable:
    """Imported at the first call: Triton is slow to import, and most processes never need it."""

    def run(*args, **kwargs):
        return getattr(import_module(f"trine.ops.{OPS[op]}.triton"), op)(*args, **kwargs)

    return run


def available() -> bool:
    return importlib.util.find_spec("triton") is not None


def in_force() -> bool:
    """Whether CUDA tensors meet the Triton kernels."""
    return torch.version.cuda is not None and not _library.cuda_library.loaded and available()


def _register(device: str, override: bool) -> torch.library.Library:
    library = torch.library.Library("trine", "IMPL")
    for op in OPS:
        library.impl(op, _kernel(op), device.upper(), allow_override=override)
    return library


@contextmanager
def forced(device: str) -> Iterator[None]:
    """Inside the block the operators run Triton on tensors of `device`, whatever else there is.

    For the whole process, and meant for tests and benchmarks. On the CPU Triton needs
    TRITON_INTERPRET=1 from the start of the process.
    """
    library = _register(device, override=True)
    try:
        yield
    finally:
        library._destroy()


# Registrations live as long as their library.
_registered = _register("CUDA", override=False) if in_force() else None
