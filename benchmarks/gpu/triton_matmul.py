"""A bf16 matrix product as one writes it in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from trine.ops._triton import row_bucket, tile_position, tuned


@triton.jit
def _kernel(
    x,
    weight,
    y,
    M,
    N,
    K,
    row_bucket,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, column = tile_position(M, N, BLOCK_M, BLOCK_N)
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        a = tl.load(x + m.to(tl.int64)[:, None] * K + k[None, :], mask=(m < M)[:, None], other=0.0)
        b = tl.load(
            weight + n.to(tl.int64)[None, :] * K + k[:, None], mask=(n < N)[None, :], other=0.0
        )
        acc = tl.dot(a, b, acc)
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], acc.to(y.dtype.element_ty), mask=inside)


_tuned = tuned(_kernel, "BLOCK_K", ("row_bucket", "N", "K"))


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] @ weight [N, K].T; K must be a multiple of 128."""
    (m, k), n = x.shape, weight.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)

    def grid(meta: dict) -> tuple[int]:
        return (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)

    _tuned[grid](x, weight, y, m, n, k, row_bucket(m))
    return y
