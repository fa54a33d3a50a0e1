"""Loads the compiled libraries: `_C` (and with it libtrine), and libtrine_cuda where it can run."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

try:
    from trine import _C  # loading it registers the operators
except ImportError as error:
    raise ImportError(
        "trine's compiled library could not be loaded. It is built against the installed torch: "
        "after changing torch, run 'pip install --no-build-isolation --force-reinstall --no-deps "
        f"trine' again. The loader said: {error}"
    ) from error


@dataclass(frozen=True)
class CudaLibrary:
    """Whether libtrine_cuda is loaded, as a fact and as a sentence."""

    loaded: bool
    status: str


def load_cuda_library(path: Path) -> CudaLibrary:
    """Load the CUDA kernels where torch has CUDA; warn where that fails, and go on without them.

    Whether a GPU is visible plays no role: a process may start before it sees one. libtrine, which
    declares the operators, must be loaded already: importing `_C` has done that.
    """
    if not _C.cuda_kernels:
        return CudaLibrary(False, _C.cuda_build)  # and a file that an older build left is not ours
    if not path.exists():
        return CudaLibrary(False, f"{_C.cuda_build}, but {path} is missing: install trine again")
    if torch.version.cuda is None:
        return CudaLibrary(
            False,
            f"{_C.cuda_build}, not loaded: this torch ({torch.__version__}) has no CUDA support",
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        # torch's own message names the path alone; what the loader said is its cause.
        status = f"{_C.cuda_build}, but failed to load: {error.__cause__ or error}"
        warnings.warn(f"trine's CUDA library was {status}", RuntimeWarning, stacklevel=2)
        return CudaLibrary(False, status)
    return CudaLibrary(True, f"{_C.cuda_build}, loaded")


cuda_library = load_cuda_library(Path(__file__).with_name("libtrine_cuda.so"))
