"""quantize_rows alone: what a linear op spends before its product."""

from functools import partial
from importlib import import_module

import torch
from torch import Tensor
from trine.ops import quantize_rows
from trine.ops.quantize_rows import reference

from benchmarks.case import Comparison, WrongResult
from benchmarks.ceilings import Work
from benchmarks.gpu.entries import Entries, kernel_of, rotated_copies
from benchmarks.gpu.peers import compiled
from benchmarks.measure import Call

OP = "quantize_rows"


def _in_triton(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return import_module("trine.ops.quantize_rows.triton").quantize_rows(x)


def _in_pytorch(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.float()
    scale = wide.abs().amax(1) / 127
    q = torch.round(wide / scale[:, None]).to(torch.int8)
    return q, scale, q.sum(1, dtype=torch.int32)


def comparison(shape: tuple[int, int], device: str, rotated: int) -> Comparison:
    m, k = shape
    x = torch.randn(m, k, device=device).bfloat16()
    inputs = rotated_copies((x,), rotated)
    work = Work(bytes_moved=(x.element_size() + 1) * m * k)  # reads x, writes bytes
    entries = Entries({"M": m, "K": k})

    def ours(run) -> tuple[list[Call], None]:
        for actual, expected in zip(run(x), reference.quantize_rows(x), strict=True):
            if not torch.equal(actual, expected):
                raise WrongResult("quantize_rows differs from its definition")
        return theirs(run)

    def theirs(run) -> tuple[list[Call], None]:
        return [partial(run, *arguments) for arguments in inputs], None

    about = dict(op=OP, rivals=("eager", "torch.compile"), baseline="eager")
    entries.enter(OP, work, lambda: ours(quantize_rows), kernel=kernel_of(OP), **about)
    entries.enter(f"{OP} triton", work, lambda: ours(_in_triton), kernel="triton", **about)
    entries.enter("eager", work, lambda: theirs(_in_pytorch))
    entries.enter("torch.compile", work, lambda: theirs(compiled(_in_pytorch)))
    return entries.comparison()
