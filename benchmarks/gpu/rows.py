"""The ops that quantise rows, alone: what a linear op spends before its product."""

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from torch import Tensor
from trine import ops
from trine.ops._triton_kernels import OPS

from benchmarks.case import Comparison, WrongResult
from benchmarks.ceilings import Work
from benchmarks.gpu.entries import Entries, kernel_of, rotated_copies
from benchmarks.gpu.peers import compiled
from benchmarks.measure import Call

Rows = tuple[Tensor, Tensor, Tensor]
EPS = 1e-5


def _quantise(x: Tensor) -> Rows:
    wide = x.float()
    scale = wide.abs().amax(1) / 127
    q = torch.round(wide / scale[:, None]).to(torch.int8)
    return q, scale, q.sum(1, dtype=torch.int32)


def _rms_norm_and_quantise(x: Tensor, weight: Tensor, eps: float) -> Rows:
    return _quantise(torch.nn.functional.rms_norm(x, weight.shape, weight, eps))


def _layer_norm_and_quantise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Rows:
    return _quantise(torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps))


# By op, the same steps written in PyTorch.
IN_PYTORCH: dict[str, Callable[..., Rows]] = {
    "quantize_rows": _quantise,
    "rms_norm_quantize_rows": _rms_norm_and_quantise,
    "layer_norm_quantize_rows": _layer_norm_and_quantise,
}
# Tensors [K] beside x; with any, eps follows.
PARAMETERS = {"quantize_rows": 0, "rms_norm_quantize_rows": 1, "layer_norm_quantize_rows": 2}


def _part(op: str, part: str) -> Callable[..., Rows]:
    return getattr(import_module(f"trine.ops.{OPS[op]}.{part}"), op)


def _in_triton(op: str, *arguments) -> Rows:
    return _part(op, "triton")(*arguments)


def comparison(op: str, shape: tuple[int, int], device: str, rotated: int) -> Comparison:
    m, k = shape
    x = torch.randn(m, k, device=device).bfloat16()
    parameters = (torch.rand(PARAMETERS[op], k, device=device) + 0.5).bfloat16()
    rest = (*parameters, EPS) if PARAMETERS[op] else ()
    inputs = rotated_copies((x,), rotated)
    work = Work(bytes_moved=(x.element_size() + 1) * m * k)  # reads x, writes bytes
    entries = Entries({"M": m, "K": k})

    def ours(run: Callable[..., Rows]) -> tuple[list[Call], None]:
        for actual, expected in zip(run(x, *rest), _part(op, "reference")(x, *rest), strict=True):
            if not torch.equal(actual, expected):
                raise WrongResult(f"{op} differs from its definition")
        return theirs(run)

    def theirs(run: Callable[..., Rows]) -> tuple[list[Call], None]:
        return [partial(run, *copy, *rest) for copy in inputs], None

    about = dict(op=op, rivals=("eager", "torch.compile"), baseline="eager")
    entries.enter(op, work, lambda: ours(getattr(ops, op)), kernel=kernel_of(OPS[op]), **about)
    in_triton = partial(_in_triton, op)
    entries.enter(f"{op} triton", work, lambda: ours(in_triton), kernel="triton", **about)
    entries.enter("eager", work, lambda: theirs(IN_PYTORCH[op]))
    entries.enter("torch.compile", work, lambda: theirs(compiled(IN_PYTORCH[op])))
    return entries.comparison()
