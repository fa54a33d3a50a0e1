"""`torch.export` of a model with packed layers, and a package that C++ runs without Python."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from trine.compress.layers import require_module
from trine.export.files import written_beside


def to_program(
    model: nn.Module, example_inputs: Any, *, dynamic_shapes: Any = None
) -> ExportedProgram:
    """`model` as a graph of operators, trine's among them, by `torch.export.export`.

    Args:
        model: in evaluation mode.
        example_inputs: a tensor (the only argument), a tuple (positional arguments) or a mapping
            (keyword arguments).
        dynamic_shapes: which axes may have another length than in the example, as
            `torch.export.export` takes it: ``({0: torch.export.Dim.DYNAMIC},)``, say, or, for a
            mapping, by its keys.

    Raises ValueError for a model in training mode and for inputs of another form.
    """
    require_module(model, "export")
    if any(module.training for module in model.modules()):
        raise ValueError("export: the model is in training mode; call model.eval() first")
    args, kwargs = (), {}
    if isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    elif isinstance(example_inputs, Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, tuple):
        args = example_inputs
    else:
        raise ValueError(
            "export: example_inputs must be a tensor, a tuple of arguments or a mapping of keyword "
            f"arguments; got {type(example_inputs).__name__}"
        )
    with torch.no_grad():
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)


def to_package(
    model: nn.Module, path: str | PathLike, example_inputs: Any, *, dynamic_shapes: Any = None
) -> None:
    """Write `model` as an AOTInductor package, which Python and C++ run.

    A program in C++ needs torch's libraries and, opened before the package is loaded, libtrine,
    which holds the operators and no Python (`trine.export.library()` is its path):

        dlopen(libtrine, RTLD_NOW | RTLD_GLOBAL);
        torch::inductor::AOTIModelPackageLoader model("model.pt2");
        std::vector<at::Tensor> outputs = model.run({x});

    Args:
        path: ends with ".pt2"; replaced in one step.
        model, example_inputs, dynamic_shapes: as for `to_program`.

    Raises ValueError for another ending, and what `to_program` raises.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"to_package: {str(path)!r} must end with .pt2")
    program = to_program(model, example_inputs, dynamic_shapes=dynamic_shapes)
    with written_beside(path) as part:
        torch._inductor.aoti_compile_and_package(program, package_path=str(part))


def library() -> Path:
    """The shared library with trine's operators, for programs without Python."""
    return Path(__file__).parent.parent / "libtrine.so"
