"""`int8_embedding` on Triton: the formula and its roundings are those of the compiled kernels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trine.ops import _triton
from trine.ops._triton import narrow
from trine.ops.int8_embedding import _fake as check_and_allocate


@triton.jit(debug=True)  # without it there is no device_assert
def int8_embedding_kernel(indices, codes, scale, y, V, D, WIDTH, BLOCK: tl.constexpr):
    """One block of a row for each program."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.load(indices + row).to(tl.int64)
    tl.device_assert((index >= 0) & (index < V), "int8_embedding: indices must lie in [0, V)")
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(codes + index * WIDTH + at, mask=at < D, other=0)
    value = code.to(tl.float32) * tl.load(scale + index)
    tl.store(y + row * D + at, narrow(value, y.dtype.element_ty), mask=at < D)


def int8_embedding(
    indices: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    y = check_and_allocate(indices, packed_weight, weight_scale, embedding_dim, dtype)
    if y.numel() == 0:
        return y
    codes = packed_weight.contiguous()
    block = min(max(triton.next_power_of_2(embedding_dim), 128), 1024)
    int8_embedding_kernel[(indices.numel(), triton.cdiv(embedding_dim, block))](
        indices.contiguous(),
        codes,
        weight_scale.contiguous(),
        y,
        codes.shape[0],
        embedding_dim,
        codes.shape[1],
        BLOCK=block,
        sanitize_overflow=False,  # debug would check every sum of integers
        **_triton.LAUNCH,
    )
    return y
