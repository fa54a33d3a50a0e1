"""Rows of an int8 table on the GPU, against torch's tables of bf16 and fp32."""

from functools import partial

import torch
from torch.nn import functional
from trine.ops import int8_embedding, pack_int8
from trine.ops.int8_embedding import reference
from trine.quantize import int8_absmax

from benchmarks.case import Comparison, WrongResult, relative_error
from benchmarks.ceilings import Work
from benchmarks.gpu.entries import Entries, kernel_of
from benchmarks.measure import Call

OP = "int8_embedding"
Shape = tuple[int, int, int]
# Sets of indices in turn: each reads other rows. The table itself is not copied, it is large.
SETS = 16


def comparison(shape: Shape, device: str) -> Comparison:
    """`shape`: rows that are asked for, rows of the table, their width."""
    m, v, d = shape
    table = torch.randn(v, d, device=device)
    codes, scale = int8_absmax(table)
    packed = pack_int8(codes)
    sets = [torch.randint(v, (m,), device=device) for _ in range(SETS)]
    entries = Entries({"M": m, "classes": v, "K": d})

    def ours() -> tuple[list[Call], float]:
        arguments = (packed, scale, d, torch.bfloat16)
        actual = int8_embedding(sets[0], *arguments)
        if not torch.equal(actual, reference.int8_embedding(sets[0], *arguments)):
            raise WrongResult(f"{OP} differs from its definition")
        calls = [partial(int8_embedding, at, *arguments) for at in sets]
        return calls, relative_error(actual, table[sets[0]].double())

    def theirs(dtype: torch.dtype) -> tuple[list[Call], None]:
        narrow = table.to(dtype)
        return [partial(functional.embedding, at, narrow) for at in sets], None

    about = dict(op=OP, rivals=("embedding bf16",), baseline="embedding bf16")
    # Reads a byte and writes a bf16.
    entries.enter(OP, Work(bytes_moved=3 * m * d), ours, kernel=kernel_of(OP), **about)
    for name, dtype in (("embedding bf16", torch.bfloat16), ("embedding fp32", torch.float32)):
        work = Work(bytes_moved=2 * m * d * dtype.itemsize)
        entries.enter(name, work, partial(theirs, dtype))
    return entries.comparison()
