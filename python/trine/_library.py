"""Loads the compiled libraries: `_C` (and with it libtrine), and libtrine_cuda where it can run."""

from pathlib import Path

import torch

try:
    from trine import _C  # noqa: F401  (loading it registers the operators)
except ImportError as error:
    raise ImportError(
        "trine's compiled library could not be loaded. It is built against the installed torch: "
        "after changing torch, run 'pip install --no-build-isolation --force-reinstall --no-deps "
        f"trine' again. The loader said: {error}"
    ) from error

_CUDA_LIBRARY = Path(__file__).with_name("libtrine_cuda.so")


def _load_cuda_library() -> str:
    """Load the CUDA kernels if they can run here; return what happened as a sentence."""
    if not _CUDA_LIBRARY.exists():
        return "not built (no nvcc was found when trine was built)"
    if torch.version.cuda is None:
        return "built, not loaded: this torch has no CUDA support"
    try:
        torch.ops.load_library(str(_CUDA_LIBRARY))
    except OSError as error:
        return f"built, but failed to load: {error}"
    return "loaded"


_cuda_status = _load_cuda_library()


def cuda_library_status() -> str:
    return _cuda_status
